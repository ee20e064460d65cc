package cachefiles

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestHolders(t *testing.T) {
	proc := t.TempDir()
	for pid, p := range map[string]struct {
		comm string
		fds  []string
	}{
		"12":   {"nydusd\n", []string{"/dev/null", "/dev/cachefiles", "/dev/cachefiles"}},
		"7":    {"cachefilesd\n", []string{"/dev/cachefiles2"}},
		"self": {"me\n", []string{"/dev/cachefiles"}}, // a link in the real one
	} {
		dir := filepath.Join(proc, pid, "fd")
		err := os.MkdirAll(dir, 0o755)
		err = errors.Join(err, os.WriteFile(filepath.Join(proc, pid, "comm"), []byte(p.comm), 0o644))
		for i, target := range p.fds {
			err = errors.Join(err, os.Symlink(target, filepath.Join(dir, string(rune('0'+i)))))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := holders(proc, "/dev/cachefiles"); got != ": nydusd, process 12" {
		t.Errorf("got %q", got)
	}
	if got := holders(t.TempDir(), "/dev/cachefiles"); got != "" {
		t.Errorf("without a process table: %q", got)
	}
}
