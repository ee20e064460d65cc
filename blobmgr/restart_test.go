package blobmgr

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/chunk"
)

// cleanCopy makes a cache directory in which x is complete or, with part, has its
// first half, and returns it closed.
func cleanCopy(t *testing.T, x *fixture, part bool) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "cache")
	o := quietOptions()
	o.Dir = dir
	m := newManager(t, o)
	b := open(t, m, x.source(&store{stored: x.stored}))
	n := b.Size()
	if part {
		n /= 2
	}
	fill(t, b, x, 0, n)
	closeBlob(t, b)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// unreachable is a store that must not be asked.
func unreachable(x *fixture) *store {
	return &store{stored: x.stored, openErr: errors.New("the store was asked")}
}

func TestCompleteBlobNeedsNoBackend(t *testing.T) {
	x := makeBlob(t, 20, lengths(20, 50))
	dir := cleanCopy(t, x, false)
	s := unreachable(x)
	o := quietOptions()
	o.Dir = dir
	b := open(t, newManager(t, o), x.source(s))
	defer closeBlob(t, b)
	select {
	case <-b.Done():
	default:
		t.Error("not done")
	}
	check(t, b, x, 0, b.Size())
	if s.opens != 0 {
		t.Error("the store was asked")
	}
}

func TestRestart(t *testing.T) {
	x := makeBlob(t, 21, lengths(21, 50))
	id := x.entry.ID
	half := int64(len(x.plain)) / 2
	firstWords := func(t *testing.T, dir string, p string) {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(dir, id), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte(p), 100); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	for _, c := range []struct {
		name    string
		change  func(t *testing.T, dir string)
		ready   bool // at once
		refetch bool // something
	}{
		{"clean", func(*testing.T, string) {}, true, false},
		{"no mark", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, id+cleanSuffix)) }, false, false},
		{"no mark and damaged", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, id+cleanSuffix))
			firstWords(t, dir, "damage")
		}, false, true},
		{"damaged mark", func(t *testing.T, dir string) { damage(t, filepath.Join(dir, id+cleanSuffix)) }, false, false},
		{"damaged table", func(t *testing.T, dir string) { damage(t, filepath.Join(dir, id+metaSuffix)) }, false, false},
		{"short table", func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, id+metaSuffix), 100) }, false, false},
		{"empty table", func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, id+metaSuffix), 0) }, false, false},
		{"no table", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, id+metaSuffix)) }, false, false},
		{"other size", func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, id), 8192) }, false, true},
		{"no cache file", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, id)) }, false, true},
		{"hole", func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, id), 4096); err != nil {
				t.Fatal(err)
			}
			os.Truncate(filepath.Join(dir, id), int64(len(x.plain)))
		}, false, true},
		{"symlink", func(t *testing.T, dir string) {
			other := filepath.Join(t.TempDir(), "other")
			os.Rename(filepath.Join(dir, id), other)
			os.Symlink(other, filepath.Join(dir, id))
		}, false, true},
		{"readable by others", func(t *testing.T, dir string) { os.Chmod(filepath.Join(dir, id), 0o644) }, false, true},
		{"second link", func(t *testing.T, dir string) { os.Link(filepath.Join(dir, id), filepath.Join(dir, "link")) }, false, true},
		{"fifo", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, id))
			syscall.Mkfifo(filepath.Join(dir, id), 0o600)
		}, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := cleanCopy(t, x, true)
			c.change(t, dir)
			o := quietOptions()
			o.Dir = dir
			m := newManager(t, o)
			s := &store{stored: x.stored}
			b := open(t, m, x.source(s))
			s.requests()
			if got := b.Ready(0, half); got != c.ready {
				t.Errorf("ready: %v", got)
			}
			fill(t, b, x, 0, half)
			if log, _ := s.requests(); (len(log) > 0) != c.refetch {
				t.Errorf("%d requests", len(log))
			}
			fill(t, b, x, 0, b.Size())
			closeBlob(t, b)
			b = open(t, m, x.source(unreachable(x)))
			check(t, b, x, 0, b.Size())
			closeBlob(t, b)
		})
	}
}

func damage(t *testing.T, path string) {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p[len(p)/2] ^= 1
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A cache file that was unlinked because it did not fit must not be trusted with the
// mark of its predecessor after a crash.
func TestMarkOfAnotherFileIsTakenAway(t *testing.T) {
	x := makeBlob(t, 22, lengths(22, 20))
	dir := cleanCopy(t, x, false)
	os.Truncate(filepath.Join(dir, x.entry.ID), 8192)
	o := quietOptions()
	o.Dir = dir
	b := open(t, newManager(t, o), x.source(&store{stored: x.stored}))
	defer closeBlob(t, b)
	if slices.Contains(files(t, dir), x.entry.ID+cleanSuffix) {
		t.Error("the mark stands")
	}
}

func TestFailedOpenLeavesNothing(t *testing.T) {
	x, y := makeBlob(t, 23, lengths(23, 20)), makeBlob(t, 24, lengths(24, 20))
	m := newManager(t, quietOptions())
	for name, s := range map[string]Source{
		"missing": x.source(&store{openErr: os.ErrNotExist}),
		"short":   x.source(&store{stored: x.stored[:len(x.stored)/2]}),
		"another": x.source(&store{stored: y.stored}),
		"digests of another": {
			Entry: x.entry, Store: &store{stored: x.stored}, Ref: x.ref, Digests: y.digests,
		},
		"bad id": func() Source {
			s := x.source(&store{stored: x.stored})
			s.Entry.ID = "../x"
			return s
		}(),
	} {
		if b, err := m.Open(t.Context(), s); err == nil {
			t.Errorf("%s: opened", name)
			b.Close()
		}
		if left := files(t, m.opt.Dir); len(left) > 0 {
			t.Errorf("%s: left %v", name, left)
		}
		if len(m.names) > 0 {
			t.Errorf("%s: left names", name)
		}
	}
	if _, err := m.Open(t.Context(), x.source(&store{openErr: os.ErrNotExist})); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func TestOneProcessPerDirectory(t *testing.T) {
	m := newManager(t, quietOptions())
	if m, err := New(Options{Dir: m.opt.Dir}); err == nil {
		m.Close()
		t.Error("a second manager of the directory")
	}
}

func TestLazyOpenWithLocalTable(t *testing.T) {
	x := makeBlob(t, 25, lengths(25, 20))
	o := quietOptions()
	b := open(t, newManager(t, o), x.source(&store{stored: x.stored}))
	src := x.source(&store{stored: x.stored})
	src.LocalTable = b.table.Marshal()
	closeBlob(t, b)
	s := src.Store.(*store)
	b = open(t, newManager(t, quietOptions()), src)
	defer closeBlob(t, b)
	if s.opens != 0 {
		t.Error("the store was asked before data was needed")
	}
	fill(t, b, x, 0, 4096)
}

func TestShareIsOneBlob(t *testing.T) {
	x := makeBlob(t, 26, lengths(26, 20))
	m := newManager(t, quietOptions())
	s := &store{stored: x.stored}
	b1, b2 := open(t, m, x.source(s)), open(t, m, x.source(s))
	if b1 != b2 {
		t.Fatal("two blobs")
	}
	fill(t, b1, x, 0, b1.Size())
	closeBlob(t, b1)
	check(t, b2, x, 0, b2.Size())
	if len(b2.origins) != 1 {
		t.Errorf("%d origins for one store", len(b2.origins))
	}
	closeBlob(t, b2)
}

// A second image with further chunks reopens Done and gets them.
func TestShareWithMoreDigests(t *testing.T) {
	x := makeBlob(t, 27, lengths(27, 20))
	o := Options{CompletionDelay: time.Millisecond}
	m := newManager(t, o)
	s := &store{stored: x.stored}
	first := x.source(s)
	first.Digests = x.digests[:5]
	b := open(t, m, first)
	fill(t, b, x, 0, 1)
	<-b.Done()
	open(t, m, x.source(s))
	select {
	case <-b.Done():
		t.Fatal("done without the chunks of the second image")
	default:
	}
	fill(t, b, x, b.Size()-1, 1)
	<-b.Done()
	check(t, b, x, 0, b.Size())
	closeBlob(t, b)
	closeBlob(t, b)
	b = open(t, m, x.source(unreachable(x)))
	check(t, b, x, 0, b.Size())
	closeBlob(t, b)
}

// An image that claims other digests under the same id gets a file of its own,
// whoever comes first, and across restarts.
func TestConflictGetsAVariant(t *testing.T) {
	x := makeBlob(t, 28, lengths(28, 20))
	s := &store{stored: x.stored}
	forged := x.source(s)
	forged.Digests = slices.Clone(x.digests)
	forged.Digests[3].Digest[0] ^= 1
	for _, first := range []string{"forged", "true"} {
		m := newManager(t, quietOptions())
		var bad, good *Blob
		if first == "forged" {
			bad = open(t, m, forged)
			good = open(t, m, x.source(s))
		} else {
			good = open(t, m, x.source(s))
			bad = open(t, m, forged)
		}
		if good == bad || good.Path() == bad.Path() {
			t.Fatal("shared")
		}
		fill(t, good, x, 0, good.Size())
		err := bad.Fill(t.Context(), 0, bad.Size())
		if corrupt := (*chunk.CorruptError)(nil); !errors.As(err, &corrupt) || corrupt.Chunk != 3 {
			t.Errorf("forged: %v", err)
		}
		path := good.Path()
		closeBlob(t, good)
		closeBlob(t, bad)
		good = open(t, m, x.source(unreachable(x)))
		if good.Path() != path {
			t.Error("another file after a restart")
		}
		check(t, good, x, 0, good.Size())
		closeBlob(t, good)
	}
}

func TestFullDisk(t *testing.T) {
	x := makeBlob(t, 29, lengths(29, 60))
	isFull := true
	o := quietOptions()
	o.wrap = func(f cacheFile) cacheFile {
		return &hookedFile{cacheFile: f, write: func(off int64, _ int) error {
			if isFull && off > 100<<10 {
				return syscall.ENOSPC
			}
			return nil
		}}
	}
	m := newManager(t, o)
	s := &store{stored: x.stored}
	b := open(t, m, x.source(s))
	half := b.Size() / 2
	fill(t, b, x, 0, 8192)
	err := b.Fill(t.Context(), half, b.Size())
	if !errors.Is(err, syscall.ENOSPC) || !bytes.Contains([]byte(err.Error()), []byte("free space")) {
		t.Fatalf("Fill: %v", err)
	}
	if b.Ready(half, b.Size()) {
		t.Error("ready")
	}
	closeBlob(t, b) // half-written units must not be trusted now
	b = open(t, m, x.source(s))
	if b.Ready(half, b.Size()) {
		t.Error("ready after a restart")
	}
	isFull = false
	fill(t, b, x, 0, b.Size())
	closeBlob(t, b)
}

func FuzzMeta(f *testing.F) {
	x := makeBlob(f, 30, lengths(30, 10))
	b := open(f, newManager(f, quietOptions()), x.source(&store{stored: x.stored}))
	p := marshalMeta(b.entry, b.table)
	f.Add(p[len(metaMagic) : len(p)-32])
	closeBlob(f, b)
	f.Fuzz(func(t *testing.T, p []byte) {
		// With a right sum, so that the fuzzer gets behind it.
		e, table, err := parseMeta(seal(append([]byte(metaMagic), p...)))
		if err == nil && !bytes.Equal(marshalMeta(e, table)[len(metaMagic):len(metaMagic)+64], p[:64]) {
			t.Error("another id")
		}
	})
}
