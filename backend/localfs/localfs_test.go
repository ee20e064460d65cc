package localfs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/localfs"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func fill(t *testing.T, dir string, blobs ...[]byte) (backend.Store, []backend.Ref) {
	t.Helper()
	var refs []backend.Ref
	for _, p := range blobs {
		d := digest.FromBytes(p)
		if err := os.WriteFile(filepath.Join(dir, d.Encoded()), p, 0o644); err != nil {
			t.Fatal(err)
		}
		refs = append(refs, backend.Ref{Digest: d, Size: int64(len(p))})
	}
	s, err := localfs.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s, refs
}

func TestConformance(t *testing.T) {
	backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
		return fill(t, t.TempDir(), blobs...)
	})
}

func TestNew(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := localfs.New(file); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file as directory: %v", err)
	}
	if _, err := localfs.New(file + "-missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v", err)
	}
}

// TestFileChanges: a blob that is open outlives its name, and one that was cut
// off afterwards is an error, never zeros.
func TestFileChanges(t *testing.T) {
	dir, data := t.TempDir(), backendtest.Bytes(100_000, 1)
	s, refs := fill(t, dir, data)
	b, err := s.Open(t.Context(), refs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	name := filepath.Join(dir, refs[0].Digest.Encoded())
	if err := os.Rename(name, name+".old"); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, len(data))
	if err := b.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, data) {
		t.Errorf("read after the name is gone: %v", err)
	}
	if err := os.Truncate(name+".old", 50_000); err != nil {
		t.Fatal(err)
	}
	err = b.ReadAt(t.Context(), p, 0)
	if err == nil || backend.Temporary(err) || !strings.Contains(err.Error(), "100000 bytes when it was opened and ends at 50000") {
		t.Errorf("read of a file that was cut off: %v", err)
	}
}

func TestNotRegular(t *testing.T) {
	dir := t.TempDir()
	s, refs := fill(t, dir, backendtest.Bytes(10, 1))
	name := filepath.Join(dir, refs[0].Digest.Encoded())
	if err := os.Rename(name, name+".real"); err != nil {
		t.Fatal(err)
	}
	for what, make := range map[string]func() error{
		"symbolic link": func() error { return os.Symlink(name+".real", name) },
		"directory":     func() error { return os.Mkdir(name, 0o755) },
		"pipe":          func() error { return syscall.Mkfifo(name, 0o644) },
	} {
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Open(t.Context(), refs[0]); !errors.Is(err, fs.ErrInvalid) || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}
