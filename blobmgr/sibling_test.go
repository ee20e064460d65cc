package blobmgr

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// leftDir is a directory with what cachefiles has kept: x's plain bytes, as the kernel
// leaves them.
func leftDir(t *testing.T, x *fixture) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, x.entry.ID), x.plain, 0); err != nil {
		t.Fatal(err)
	}
	return dir
}

// beside are options of a Manager, with a cache directory of its own, that finds siblings
// in dir.
func beside(t *testing.T, dir string) Options {
	o := quietOptions()
	o.Dir = filepath.Join(t.TempDir(), "cache")
	o.Sibling = func(_, id string) string { return filepath.Join(dir, id) }
	return o
}

// known makes the blob known to a Manager with the options: its chunk table is kept.
func known(t *testing.T, o Options, s Source) {
	t.Helper()
	o.Sibling = nil
	m := newManager(t, o)
	closeBlob(t, open(t, m, s))
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

func gone(t *testing.T, name string) bool {
	t.Helper()
	_, err := os.Lstat(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err != nil
}

// notAsked fails t if s was asked for anything.
func (s *store) notAsked(t *testing.T) {
	t.Helper()
	if log, n := s.requests(); n != 0 {
		t.Errorf("%d requests, %d bytes, for what another transport has kept", len(log), n)
	}
}

// What cachefiles has kept is not fetched, and goes once all of it is here.
func TestSibling(t *testing.T) {
	x := makeBlob(t, 1, lengths(1, 60))
	s := &store{stored: x.stored}
	dir := leftDir(t, x)
	kept := filepath.Join(dir, x.entry.ID)
	o := beside(t, dir)
	known(t, o, x.source(s))
	m := newManager(t, o)
	s.requests()

	b := open(t, m, x.source(s))
	half := b.Size() / 2
	fill(t, b, x, 0, half)
	closeBlob(t, b)
	if gone(t, kept) {
		t.Fatal("it is gone though half of it was not taken")
	}
	b = open(t, m, x.source(s))
	check(t, b, x, 0, half)
	fill(t, b, x, 0, b.Size())
	waitDone(t, b)
	if n := b.Stats().Reused; n == 0 || n > b.Size()-half+1<<20 {
		t.Errorf("%d bytes taken in the second half of %d", n, b.Size())
	}
	closeBlob(t, b)
	s.notAsked(t)
	if !gone(t, kept) {
		t.Error("it stays though all of it was taken")
	}

	// The mark of the clean end vouches for it like for anything else.
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	// One that came back, or whose daemon was killed just before it went, goes now.
	if err := os.WriteFile(kept, x.plain, 0o600); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, o)
	b = open(t, m, x.source(s))
	check(t, b, x, 0, b.Size())
	closeBlob(t, b)
	s.notAsked(t)
	if !gone(t, kept) {
		t.Error("it stays though nothing is missing")
	}
}

// An image of which only a part is read leaves nothing behind once that is what there was.
func TestSiblingExhausted(t *testing.T) {
	x := makeBlob(t, 2, lengths(2, 40))
	s := &store{stored: x.stored}
	dir := t.TempDir()
	kept := filepath.Join(dir, x.entry.ID)
	o := beside(t, dir)
	known(t, o, x.source(s))
	m := newManager(t, o)
	b := open(t, m, x.source(s))
	end := b.table.Unit(9).Off
	closeBlob(t, b)
	content := slices.Clone(x.plain[:end])
	wrong := b.table.Unit(4)
	content[wrong.Off] ^= 1
	if err := errors.Join(os.WriteFile(kept, content, 0o600), os.Truncate(kept, b.Size())); err != nil {
		t.Fatal(err)
	}
	s.requests()
	b = open(t, m, x.source(s))
	fill(t, b, x, 0, end)
	if log, n := s.requests(); len(log) != 1 || n != wrong.CLen {
		t.Errorf("%d requests, %d bytes, want one for %d", len(log), n, wrong.CLen)
	}
	closeBlob(t, b)
	if !gone(t, kept) {
		t.Error("it stays though all that it has was taken")
	}
	b = open(t, m, x.source(s))
	check(t, b, x, 0, end)
	if b.Stats().Complete {
		t.Error("complete")
	}
	closeBlob(t, b)
}

// The other way: the kernel's file is filled from ours.
func TestSiblingOfAttached(t *testing.T) {
	x := makeBlob(t, 3, lengths(3, 60))
	s := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(s))
	fill(t, b, x, 0, b.Size())
	waitDone(t, b)
	closeBlob(t, b)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	s.requests()
	m = attachedManager(t, m.opt.Dir)
	b = open(t, m, x.source(s))
	if b.fresh {
		t.Error("the chunk table is not known any more")
	}
	o := newObjectFile(t)
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	half := b.Size() / 2
	if err := b.Fill(t.Context(), 0, half); err != nil {
		t.Fatal(err)
	}
	o.check(x, 0, half)
	if names := files(t, m.opt.Dir); len(names) != 3 {
		t.Errorf("the cache directory has %q, half of it was not taken", names)
	}
	if err := b.Fill(t.Context(), 0, b.Size()); err != nil {
		t.Fatal(err)
	}
	o.check(x, 0, b.Size())
	waitDone(t, b)
	b.Detach(o)
	closeBlob(t, b)
	s.notAsked(t)
	if names := files(t, m.opt.Dir); !slices.Equal(names, []string{x.entry.ID + metaSuffix}) {
		t.Errorf("the cache directory has %q, want the table", names)
	}
}

// Whatever is wrong with what was kept is fetched, and that only.
func TestSiblingDamaged(t *testing.T) {
	x := makeBlob(t, 4, lengths(4, 40))
	at := func(u int) int64 { return x.digests[u].Off } // every chunk is a unit
	write := func(name string, p []byte, off int64) error {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteAt(p, off)
			err = errors.Join(err, f.Close())
		}
		return err
	}
	flip := func(name string, u int) error { return write(name, []byte{^x.plain[at(u)]}, at(u)) }
	for name, c := range map[string]struct {
		spoil func(name string) error
		bad   []int // units that are fetched
	}{
		"one bit":             {func(name string) error { return flip(name, 7) }, []int{7}},
		"first, middle, last": {func(name string) error { return errors.Join(flip(name, 0), flip(name, 20), flip(name, 39)) }, []int{0, 20, 39}},
		"bytes after a chunk": {func(name string) error {
			d := x.digests[5]
			return write(name, []byte{1}, d.Off+d.Len)
		}, []int{5}},
		"a hole": {func(name string) error {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err == nil {
				err = errors.Join(sparseFile{f}.PunchHole(at(10), at(12)-at(10)), f.Close())
			}
			return err
		}, []int{10, 11}},
		"another size": {func(name string) error { return os.Truncate(name, at(39)) }, nil},
		"a link": {func(name string) error {
			return errors.Join(os.Rename(name, name+"-"), os.Symlink(name+"-", name))
		}, nil},
		"a FIFO":      {func(name string) error { return errors.Join(os.Remove(name), syscall.Mkfifo(name, 0o600)) }, nil},
		"a directory": {func(name string) error { return errors.Join(os.Remove(name), os.Mkdir(name, 0o700)) }, nil},
		"nothing":     {os.Remove, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := &store{stored: x.stored}
			dir := leftDir(t, x)
			o := beside(t, dir)
			known(t, o, x.source(s))
			if err := c.spoil(filepath.Join(dir, x.entry.ID)); err != nil {
				t.Fatal(err)
			}
			b := open(t, newManager(t, o), x.source(s))
			if c.bad == nil {
				for u := range b.table.Units() {
					c.bad = append(c.bad, u)
				}
			}
			s.requests()
			for u := range b.table.Units() {
				fill(t, b, x, b.table.Unit(u).Off, 1)
			}
			check(t, b, x, 0, b.Size())
			want := int64(0)
			for _, u := range c.bad {
				want += b.table.Unit(u).CLen
			}
			if log, n := s.requests(); len(log) != len(c.bad) || n != want {
				t.Errorf("%d requests for %d bytes, want %d for %d", len(log), n, len(c.bad), want)
			}
			closeBlob(t, b)
		})
	}
}

// What was there when the blob was opened may be gone, or cut off, when it is read.
func TestSiblingVanishes(t *testing.T) {
	x := makeBlob(t, 5, lengths(5, 60))
	for name, vanish := range map[string]func(m *Manager, file string) error{
		"removed": func(_ *Manager, file string) error { return os.Remove(file) },
		"cut off": func(_ *Manager, file string) error { return os.Truncate(file, int64(len(x.plain)/3)) },
		"dropped": func(m *Manager, file string) error {
			n, err := m.DropSiblings()
			if err == nil && n < int64(len(x.plain)) {
				err = fmt.Errorf("%d bytes came back of %d", n, len(x.plain))
			}
			if _, serr := os.Stat(file); err == nil && serr == nil {
				err = errors.New("it is still there")
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &store{stored: x.stored}
			dir := leftDir(t, x)
			o := beside(t, dir)
			known(t, o, x.source(s))
			m := newManager(t, o)
			b := open(t, m, x.source(s))
			s.requests()
			fill(t, b, x, 0, 1)
			s.notAsked(t)
			if err := vanish(m, filepath.Join(dir, x.entry.ID)); err != nil {
				t.Fatal(err)
			}
			fill(t, b, x, 0, b.Size())
			if _, n := s.requests(); (n > 0) != (name != "removed") {
				t.Errorf("%d bytes fetched", n)
			}
			closeBlob(t, b)
		})
	}
}

// While the kernel's file vouches for its own data, by the table that is kept, the table
// does not change so that it would vouch for more.
func TestSiblingDisowned(t *testing.T) {
	s := batchSource(t)
	backend := s.Store.(*store)
	dir := t.TempDir()
	kept := filepath.Join(dir, s.Entry.ID)
	// cachefiles has filled what half of the chunks need: others of their batches are zero.
	o := beside(t, dir)
	attached := o
	attached.Attached = true
	m := newManager(t, attached)
	b := open(t, m, half(s))
	obj := newObjectFile(t)
	if err := b.Attach(t.Context(), obj); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(obj.f.Chmod(0o600), obj.f.Truncate(b.Size())); err != nil {
		t.Fatal(err)
	}
	fillAll(t, b, half(s))
	b.Detach(obj)
	closeBlob(t, b)
	if err := errors.Join(m.Close(), os.Rename(obj.f.Name(), kept)); err != nil {
		t.Fatal(err)
	}

	m = newManager(t, o)
	b = open(t, m, half(s)) // nothing new
	if gone(t, kept) {
		t.Fatal("it is gone though the table is the same")
	}
	backend.requests()
	first := s.Digests[0]
	if err := b.Fill(t.Context(), first.Off, first.Len); err != nil {
		t.Fatal(err)
	}
	backend.notAsked(t)
	all := open(t, m, s)
	if !gone(t, kept) {
		t.Error("the kernel's file still has its name: its zeros would be believed")
	}
	fillAll(t, all, s)
	verify(t, all, s)
	closeBlob(t, all)
	closeBlob(t, b)
}

// A blob of which nothing is known takes what is right, but the file loses its name first.
func TestSiblingOfUnknown(t *testing.T) {
	x := makeBlob(t, 6, lengths(6, 20))
	s := &store{stored: x.stored}
	dir := leftDir(t, x)
	b := open(t, newManager(t, beside(t, dir)), x.source(s))
	if !gone(t, filepath.Join(dir, x.entry.ID)) {
		t.Error("the kernel's file is vouched for by a table that it was not checked against")
	}
	s.requests()
	fill(t, b, x, 0, b.Size())
	s.notAsked(t)
	closeBlob(t, b)
}

func TestForgetSibling(t *testing.T) {
	x := makeBlob(t, 7, lengths(7, 5))
	s := &store{stored: x.stored}
	dir := leftDir(t, x)
	o := beside(t, dir)
	known(t, o, x.source(s))
	m := newManager(t, o)
	if err := m.Forget(t.Context(), "", x.entry.ID); err != nil {
		t.Fatal(err)
	}
	if !gone(t, filepath.Join(dir, x.entry.ID)) || len(files(t, o.Dir)) > 0 {
		t.Errorf("left: %q", files(t, o.Dir))
	}
}

// A full disk has room once what is there twice is gone.
func TestSiblingOnFullDisk(t *testing.T) {
	x := makeBlob(t, 8, lengths(8, 20))
	s := &store{stored: x.stored}
	dir := leftDir(t, x)
	kept := filepath.Join(dir, x.entry.ID)
	o := beside(t, dir)
	known(t, o, x.source(s))
	var full atomic.Int32
	o.wrap = func(f cacheFile) cacheFile {
		return &hookedFile{cacheFile: f, write: func(int64, int) error {
			if _, err := os.Lstat(kept); err == nil {
				full.Add(1)
				return syscall.ENOSPC
			}
			return nil
		}}
	}
	b := open(t, newManager(t, o), x.source(s))
	fill(t, b, x, 0, b.Size())
	if full.Load() == 0 {
		t.Error("the disk was not full")
	}
	closeBlob(t, b)
}

// Machines go to and fro between kernels, and end in any way: what is read is right, and
// nothing that either had when it ended in order is fetched.
func TestSiblingToAndFro(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	x := makeBlob(t, seed, lengths(seed, 80))
	s := &store{stored: x.stored}
	dir := t.TempDir()
	kept := filepath.Join(dir, x.entry.ID)
	o := beside(t, dir)
	attached := o
	attached.Attached = true
	had := map[int]bool{} // chunks that were read before
	for round := range 12 {
		fanotify := r.IntN(2) == 0
		opt := attached
		if fanotify {
			opt = o
		}
		m := newManager(t, opt)
		b := open(t, m, x.source(s))
		var obj *objectFile
		if !fanotify {
			obj = reopenObject(t, kept, b.Size())
			if err := b.Attach(t.Context(), obj); err != nil {
				t.Fatal(err)
			}
		}
		for range r.IntN(20) {
			u := r.IntN(len(x.digests))
			d := x.digests[u]
			s.requests()
			if err := b.Fill(t.Context(), d.Off, d.Len); err != nil {
				t.Fatal(err)
			}
			if fanotify {
				check(t, b, x, d.Off, d.Len)
			} else {
				obj.check(x, d.Off, d.Len)
			}
			if _, n := s.requests(); n > 0 && had[u] {
				t.Errorf("round %d, fanotify %v: chunk %d was fetched again", round, fanotify, u)
			}
			had[u] = true
		}
		if !fanotify {
			b.Detach(obj)
		}
		closeBlob(t, b)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if r.IntN(3) == 0 { // it did not end in order, or was killed while it removed our file
			if err := os.Remove(filepath.Join(o.Dir, x.entry.ID+cleanSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
}

// reopenObject is the kernel's file called name, a new one if there is none.
func reopenObject(t *testing.T, name string, size int64) *objectFile {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &objectFile{t, f}
}

// What is there twice may be dropped while many read from it.
func TestSiblingUnderReaders(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	x := makeBlob(t, seed, lengths(seed, 120))
	s := &store{stored: x.stored}
	dir := leftDir(t, x)
	o := beside(t, dir)
	known(t, o, x.source(s))
	m := newManager(t, o)
	b := open(t, m, x.source(s))
	var readers sync.WaitGroup
	for i := range 8 {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		readers.Go(func() {
			for range 60 {
				d := x.digests[r.IntN(len(x.digests))]
				if err := b.Fill(t.Context(), d.Off, d.Len); err != nil {
					t.Error(err)
				}
				if i == 0 && r.IntN(20) == 0 {
					if _, err := m.DropSiblings(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	readers.Wait()
	fill(t, b, x, 0, b.Size())
	waitDone(t, b)
	closeBlob(t, b)
	if !gone(t, filepath.Join(dir, x.entry.ID)) {
		t.Error("it stays")
	}
}
