package nydusd

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
)

// TestImages finds what an earlier process was told, without its logins, and clears away what
// was cut short.
func TestImages(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "nydusd")
	s, err := openImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := imageKey{"namespace-a", "0123"}
	i := image{ID: k.id, DomainID: k.domainID, FSID: fsidOf(k), Domain: "d", Blobs: []string{"b"}, Alive: true}
	i.bound = &binding{origin: origin{backend: object{"auth": "secret"}}}
	if err := s.put(i); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "half", "work"), 0o700); err != nil {
		t.Fatal(err)
	}
	if s, err = openImages(dir); err != nil {
		t.Fatal(err)
	}
	got, err := s.get(k)
	if err != nil || got.FSID != i.FSID || got.Domain != "d" || len(got.Blobs) != 1 || got.Alive || got.bound != nil {
		t.Errorf("%+v, %v", got, err)
	}
	record, err := os.ReadFile(filepath.Join(dir, i.FSID, recordName))
	if err != nil || strings.Contains(string(record), "secret") {
		t.Errorf("the record is %s, %v", record, err)
	}
	if err := s.remove(got); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("there is left %v, %v", left, err)
	}
	var refusal *api.Error
	if _, err := s.get(k); !errors.As(err, &refusal) || refusal.Status != 404 {
		t.Errorf("after its removal: %v", err)
	}
}

// TestAnotherLife believes of a nydusd nothing that was found out about the last one.
func TestAnotherLife(t *testing.T) {
	s, err := openImages(filepath.Join(t.TempDir(), "nydusd"))
	if err != nil {
		t.Fatal(err)
	}
	k := imageKey{"", "x"}
	i := s.obtain(k)
	i.Alive, i.bound = true, &binding{}
	s.set(i)
	if got := s.obtain(k); !got.Alive || got.bound == nil {
		t.Errorf("what was found out is forgotten: %+v", got)
	}
	s.begin()
	if got := s.obtain(k); got.Alive || got.bound != nil {
		t.Errorf("of another nydusd: %+v", got)
	}
	s.set(i) // by a call that began before
	if got := s.obtain(k); got.Alive || got.bound != nil {
		t.Errorf("of another nydusd, late: %+v", got)
	}
}

// TestFSID keeps images apart that are the same in two scopes.
func TestFSID(t *testing.T) {
	names := map[string]bool{}
	for _, k := range []imageKey{{"", "x"}, {"a", "x"}, {"b", "x"}, {"a", "y"}} {
		names[fsidOf(k)] = true
	}
	if len(names) != 4 || !names["x"] {
		t.Errorf("names %v", names)
	}
}

// TestOption reads a command line of another process.
func TestOption(t *testing.T) {
	for _, args := range [][]string{{"-F", "/dir"}, {"--fscache", "/dir"}, {"--fscache=/dir"}} {
		cmd := exec.Command("sh", append([]string{"-c", "read x", "nydusd"}, args...)...)
		in, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for end := time.Now().Add(10 * time.Second); got == "" && time.Now().Before(end); { // it is there a moment after the start
			got = optionOf(cmd.Process.Pid, "--fscache", "-F")
		}
		if got != "/dir" {
			t.Errorf("%q has %q", args, got)
		}
		in.Close()
		_ = cmd.Wait() // read fails
	}
	if got := optionOf(0, "--fscache", "-F"); got != "" {
		t.Errorf("nobody has %q", got)
	}
}

// TestRefused tells nothing of a login that nydusd repeats.
func TestRefused(t *testing.T) {
	err := refused(&nydus.Error{Status: 400, Words: `ParseBody("YTpi")`, Bare: true}, "YTpi")
	var refusal *api.Error
	if !errors.As(err, &refusal) || refusal.Status != 400 || strings.Contains(err.Error(), "YTpi") {
		t.Errorf("%v", err)
	}
}
