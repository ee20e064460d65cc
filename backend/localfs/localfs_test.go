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

func TestOptions(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("blob"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    localfs.Options
		want string // in the error; "": none
	}{
		"nothing":           {localfs.Options{AltDirs: []string{dir}}, "neither"},
		"missing directory": {localfs.Options{Dir: dir + "/missing"}, "no such file"},
		"missing others":    {localfs.Options{Dir: dir, AltDirs: []string{dir + "/missing"}}, ""},
		"missing file":      {localfs.Options{BlobFile: dir + "/missing"}, "no such file"},
		"directory as file": {localfs.Options{BlobFile: dir}, "not a regular file"},
		"file":              {localfs.Options{BlobFile: file, Dir: dir + "/missing"}, ""},
	} {
		if _, err := localfs.NewOptions(c.o); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
}

// TestBlobFile: one file is every blob, and keeps to its size.
func TestBlobFile(t *testing.T) {
	data := backendtest.Bytes(1000, 1)
	file, link := filepath.Join(t.TempDir(), "file"), filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.WriteFile(file, data, 0o644), os.Symlink(file, link)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{file, link} {
		s, err := localfs.NewOptions(localfs.Options{BlobFile: name})
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range []int64{0, 1000} {
			b, err := s.Open(t.Context(), backend.Ref{Digest: digest.FromString("any"), Size: size})
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 1000)
			if err := b.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, data) {
				t.Errorf("%s: error %v or wrong bytes", name, err)
			}
			b.Close()
		}
		if _, err := s.Open(t.Context(), backend.Ref{Digest: digest.FromString("any"), Size: 999}); err == nil {
			t.Errorf("%s: opened with another size", name)
		}
	}
}

// TestAltDirs: the first directory that has the blob as it should be is taken.
func TestAltDirs(t *testing.T) {
	data := backendtest.Bytes(1000, 1)
	d := digest.FromBytes(data)
	ref := backend.Ref{Digest: d, Size: int64(len(data))}
	const nothing, cut, whole = 0, 1, 2
	for name, c := range map[string]struct {
		dirs []int // what is in each
		err  error
	}{
		"first":            {[]int{whole, nothing, nothing}, nil},
		"last":             {[]int{nothing, nothing, whole}, nil},
		"good after wrong": {[]int{cut, nothing, whole}, nil},
		"good before":      {[]int{whole, cut, cut}, nil},
		"nowhere":          {[]int{nothing, nothing, nothing}, fs.ErrNotExist},
	} {
		var dirs []string
		for _, has := range c.dirs {
			dir := t.TempDir()
			dirs = append(dirs, dir)
			if has == nothing {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, d.Encoded()), data[:len(data)*has/whole], 0o644); err != nil {
				t.Fatal(err)
			}
		}
		s, err := localfs.NewOptions(localfs.Options{Dir: dirs[0], AltDirs: append(dirs[1:], "/missing/directory")})
		if err != nil {
			t.Fatal(err)
		}
		b, err := s.Open(t.Context(), ref)
		if !errors.Is(err, c.err) {
			t.Errorf("%s: error %v, want %v", name, err, c.err)
		}
		if err == nil {
			p := make([]byte, len(data))
			if err := b.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, data) {
				t.Errorf("%s: error %v or wrong bytes", name, err)
			}
			b.Close()
		}
	}
}

// TestWrongNotMissing: a blob that is there and wrong is not called missing because
// another directory does not have it.
func TestWrongNotMissing(t *testing.T) {
	dir := t.TempDir()
	_, refs := fill(t, dir, backendtest.Bytes(10, 1))
	s, err := localfs.NewOptions(localfs.Options{Dir: dir, AltDirs: []string{t.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	refs[0].Size++
	if _, err := s.Open(t.Context(), refs[0]); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), dir) {
		t.Errorf("error %v, want one that names the file and is not fs.ErrNotExist", err)
	}
}
