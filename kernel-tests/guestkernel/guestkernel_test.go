package guestkernel

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestUnmet(t *testing.T) {
	const got = "CONFIG_A=y\nCONFIG_NUMBER=60\n# CONFIG_OFF is not set\nCONFIG_LOUD=y\n"
	for wanted, want := range map[string][]string{
		"# a comment\nCONFIG_A=y\n":                              nil,
		"CONFIG_A=y\nCONFIG_MISSING=y\n":                         {"CONFIG_MISSING=y"},
		"CONFIG_OFF=y\n":                                         {"CONFIG_OFF=y"},
		"CONFIG_NUMBER=6\n":                                      {"CONFIG_NUMBER=6"},
		"# CONFIG_OFF is not set\n# CONFIG_UNKNOWN is not set\n": nil,
		"# CONFIG_LOUD is not set\n":                             {"# CONFIG_LOUD is not set"},
	} {
		if missing := unmet([]byte(wanted), []byte(got)); !slices.Equal(missing, want) {
			t.Errorf("%q in %q misses %q, want %q", wanted, got, missing, want)
		}
	}
}

// TestRows checks that each row asks for what this repository is about, and lists
// no option twice.
func TestRows(t *testing.T) {
	for _, row := range Rows {
		config, err := fragments(row)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(config), "\n")
		for _, want := range []string{"CONFIG_CACHEFILES_ONDEMAND=y", "CONFIG_EROFS_FS_ONDEMAND=y", "CONFIG_BUG=y"} {
			if !slices.Contains(lines, want) {
				t.Errorf("row %s does not ask for %s", row, want)
			}
		}
		seen := make(map[string]bool)
		for _, line := range lines {
			name, _, ok := strings.Cut(line, "=")
			if ok && strings.HasPrefix(name, "CONFIG_") && seen[name] {
				t.Errorf("row %s has %s twice", row, name)
			}
			seen[name] = ok
		}
	}
}

func TestKeySeparates(t *testing.T) {
	keys := map[string]string{}
	for what, k := range map[string]string{
		"one": key("6.1.1", []byte("A")), "its version": key("6.1.2", []byte("A")), "its configuration": key("6.1.1", []byte("B")),
	} {
		if other, ok := keys[k]; ok {
			t.Errorf("%s and %s have the key %s", what, other, k)
		}
		keys[k] = what
	}
}

func TestFindSaysHowToBuild(t *testing.T) {
	t.Setenv("EROFSD_CACHE", t.TempDir())
	if k, err := Find(t.Context(), "6.1"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "make kernel KERNEL=6.1") {
		t.Errorf("got %v, %v", k, err)
	}
	if _, err := Find(t.Context(), "2.4"); err == nil || !strings.Contains(err.Error(), "use one of 6.1, 6.12") {
		t.Errorf("a row that there is not gives %v", err)
	}
}

func TestPlace(t *testing.T) {
	from, to := filepath.Join(t.TempDir(), "from"), filepath.Join(t.TempDir(), "to")
	if err := place(from, to); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a source: %v", err)
	}
	if err := os.WriteFile(from, []byte("image"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := place(from, to); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(to)
	left, globErr := filepath.Glob(to + ".*")
	if err != nil || globErr != nil || string(text) != "image" || len(left) > 0 {
		t.Errorf("placed %q, %v; left %q, %v", text, err, left, globErr)
	}
}

func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, name); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a lock that is held was taken: %v", err)
	}
	unlock()
	unlock, err = lock(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}
