package daemon

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// What a daemon that was killed left half made goes with the next one's start, and nothing
// that is called alike.
func TestPartsAreRemoved(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"part-1", "part-2.boot", "part-2.json", "part-3.layer", "particle"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeParts(dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"part-1": false, "part-2.boot": true, "part-2.json": true, "part-3.layer": true, "particle": true} {
		if exists(filepath.Join(dir, name)) != want {
			t.Errorf("%s: there %v, want %v", name, !want, want)
		}
	}
	if err := removeParts(filepath.Join(dir, "missing")); err == nil {
		t.Error("a directory that is missing is no error")
	}
}

// A file that several write at once is one of theirs, whole.
func TestWriteFileAtOnce(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "record")
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var wg sync.WaitGroup
	for i := range 8 {
		p := bytes.Repeat([]byte{byte('a' + i)}, 1000*(i+1))
		wg.Go(func() {
			for range 50 {
				if err := writeFile(root, "record", p); err != nil {
					t.Error(err)
					return
				}
				got, err := os.ReadFile(name)
				if err != nil || len(got) == 0 || len(got) != 1000*int(got[0]-'a'+1) || bytes.Count(got, got[:1]) != len(got) {
					t.Errorf("%d bytes, %v", len(got), err)
					return
				}
			}
		})
	}
	wg.Wait()
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A daemon removes them when it starts.
func TestStartRemovesParts(t *testing.T) {
	testenv.Root(t)
	root := newRoot(t)
	if err := os.Mkdir(filepath.Join(root, "images"), 0o700); err != nil {
		t.Fatal(err)
	}
	part := filepath.Join(root, "images", "part-1")
	if err := os.WriteFile(part, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, daemonOptions{root: root})
	if exists(part) {
		t.Error("it is still there")
	}
}
