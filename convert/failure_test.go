package convert

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/erofsd/erofsd/internal/testenv"
)

// TestNothingLeft lets conversions into a directory fail: it must be as before.
func TestNothingLeft(t *testing.T) {
	good := makeTar(t, reg("a", strings.Repeat("content", 100000)), reg("b", "2"))
	dangling := makeTar(t, reg("a", "1"), hard("b", "nowhere"))
	for _, c := range []struct {
		name, want string
		src        func(t *testing.T) string
		o          Options
	}{
		{name: "truncated tar", want: "unexpected EOF", src: func(t *testing.T) string {
			return writeFile(t, filepath.Join(t.TempDir(), "t"), good[:len(good)/2])
		}},
		{name: "truncated gzip", want: "unexpected EOF", src: func(t *testing.T) string {
			p := gzipOf(t, good)
			return writeFile(t, filepath.Join(t.TempDir(), "t"), p[:len(p)-4])
		}},
		{name: "broken zstd", want: "magic number mismatch", src: func(t *testing.T) string {
			return writeFile(t, filepath.Join(t.TempDir(), "t"), append(zstdOf(t, good), "garbage behind the frame"...))
		}},
		{name: "xz", want: "tar, tar.gz and tar.zst can be read", src: func(t *testing.T) string {
			return writeFile(t, filepath.Join(t.TempDir(), "t"), []byte("\xfd7zXZ\x00 and so on"))
		}},
		{name: "no tar", want: "invalid tar header", src: func(t *testing.T) string {
			return writeFile(t, filepath.Join(t.TempDir(), "t"), bytes.Repeat([]byte("no tar! "), 1000))
		}},
		{name: "empty file", want: "is empty", src: func(t *testing.T) string { return writeFile(t, filepath.Join(t.TempDir(), "t"), nil) }},
		{name: "missing", want: "no such file", src: func(t *testing.T) string { return filepath.Join(t.TempDir(), "missing") }},
		{name: "second layer", want: "hard link", src: func(t *testing.T) string { return makeLayout(t, nil, good, dangling) }},
		{name: "chunk size", want: "powers of two", o: Options{ChunkSize: 5000}, src: func(t *testing.T) string { return t.TempDir() }},
		{name: "compressor", want: "lz4_block", o: Options{Compressor: "lzma"}, src: func(t *testing.T) string { return t.TempDir() }},
		{name: "limits", want: "too many entries", o: Options{limits: &limits{entries: 1, meta: 100, chunks: 100}}, src: func(t *testing.T) string { return makeTree(t) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := c.src(t)
			base := t.TempDir()
			_, err := ConvertToDir(t.Context(), src, filepath.Join(base, "new", "deep"), c.o)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if left, _ := os.ReadDir(base); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			old := filepath.Join(base, "old")
			writeFile(t, filepath.Join(old, bootstrapName), []byte("old"))
			writeFile(t, filepath.Join(old, blobsName, "old"), []byte("old"))
			before := readAll(t, base)
			if _, err := ConvertToDir(t.Context(), src, old, c.o); err == nil {
				t.Error("no error")
			}
			if diff := cmp.Diff(before, readAll(t, base)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestDiskFull converts into a file system with room for half of the blob.
func TestDiskFull(t *testing.T) {
	testenv.Root(t)
	small := t.TempDir()
	if err := syscall.Mount("small", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	r := rand.New(rand.NewPCG(3, 4))
	content := make([]byte, 2<<20)
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	src := writeFile(t, filepath.Join(t.TempDir(), "t"), makeTar(t, reg("random", string(content))))
	if _, err := ConvertToDir(t.Context(), src, filepath.Join(small, "image"), Options{}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("error %v", err)
	}
	if _, err := Convert(t.Context(), src, &fakeRegistry{}, Options{TempDir: small}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("error %v", err)
	}
	if left, _ := os.ReadDir(small); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestInterrupted(t *testing.T) {
	src := writeFile(t, filepath.Join(t.TempDir(), "t"), makeTar(t,
		reg("a", strings.Repeat("1234567", 1<<20)), reg("b", strings.Repeat("abcdefghi", 1<<20))))
	for n := range 12 {
		ctx, cancel := context.WithCancel(t.Context())
		events := 0
		o := Options{ChunkSize: 4096, Progress: func(Event) {
			if events++; events > n {
				cancel()
			}
		}}
		dir := filepath.Join(t.TempDir(), "image")
		if _, err := ConvertToDir(ctx, src, dir, o); !errors.Is(err, context.Canceled) {
			t.Errorf("after %d events: error %v", n, err)
		}
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after %d events something is left", n)
		}
		cancel()
	}
}

func TestDestinationInsideSource(t *testing.T) {
	src := t.TempDir()
	writeFile(t, filepath.Join(src, "f"), []byte("x"))
	for _, dir := range []string{src, filepath.Join(src, "a", "b")} {
		if _, err := ConvertToDir(t.Context(), src, dir, Options{}); err == nil || !strings.Contains(err.Error(), "inside the source") {
			t.Errorf("%s: error %v", dir, err)
		}
	}
	if list, _ := os.ReadDir(src); len(list) != 1 {
		t.Errorf("source has %d entries now", len(list))
	}
	if _, err := ConvertToDir(t.Context(), src, src+"-image", Options{}); err != nil {
		t.Error(err)
	}
}

// TestFileChanges changes a file while it is read.
func TestFileChanges(t *testing.T) {
	for name, change := range map[string]func(string) error{
		"truncated": func(p string) error { return os.Truncate(p, 10) },
		"grown":     func(p string) error { return os.Truncate(p, 5<<20) },
		"written":   func(p string) error { return os.Chtimes(p, time.Unix(1, 0), time.Unix(1, 0)) },
	} {
		t.Run(name, func(t *testing.T) {
			src := filepath.Join(t.TempDir(), "src")
			file := writeFile(t, filepath.Join(src, "f"), bytes.Repeat([]byte("x"), 4<<20))
			done := false
			_, err := ConvertToDir(t.Context(), src, filepath.Join(t.TempDir(), "image"), Options{Progress: func(Event) {
				if !done {
					done = true
					if err := change(file); err != nil {
						t.Error(err)
					}
				}
			}})
			if err == nil || !strings.Contains(err.Error(), file+" changed while it was read") {
				t.Errorf("error %v", err)
			}
		})
	}
}
