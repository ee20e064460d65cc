package registry

import (
	"os"
	"path/filepath"
	"testing"
)

// TestHostDir: a host's name leads to directories in root, and nowhere else.
func TestHostDir(t *testing.T) {
	top := t.TempDir()
	root := filepath.Join(top, "hosts")
	for _, name := range []string{"reg.example", "reg.example_5000_", "a"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for host, want := range map[string]string{
		"reg.example": "reg.example", "reg.example:5000": "reg.example_5000_", "other.example": "",
		"..": "", ".": "", "../hosts/a": "", "a/..": "", "a/../../hosts/a": "", "": "", "/": "",
	} {
		if want != "" {
			want = filepath.Join(root, want)
		}
		if got, err := hostDir(root, host); got != want || err != nil {
			t.Errorf("%q: got %q, %v; want %q", host, got, err, want)
		}
	}
}
