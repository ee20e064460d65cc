package cachefiles_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
)

func TestServe(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 300<<10+5)
	var mu sync.Mutex
	seen := map[Op]int{}
	s := start(t, k.Device(), handle(b), Options{Observer: func(op Op, d time.Duration, err error) {
		mu.Lock()
		defer mu.Unlock()
		seen[op]++
		if d <= 0 || err != nil {
			t.Errorf("observed %s, %v, %v", op, d, err)
		}
	}})
	o := open(t, k, img)
	if want := int64(304 << 10); o.Size() != want {
		t.Errorf("size %d, want %d", o.Size(), want)
	}
	check(t, o, b, 0, len(b.data))
	check(t, o, b, 5000, 100)
	if n := b.fills.Load(); n != 3 {
		t.Errorf("%d READs for 300 KiB, want 3", n)
	}
	if k.Has(img) {
		t.Error("a new object is on disk before it is closed")
	}
	o.Close()
	until(t, "the object is closed", func() bool { return b.closes.Load() == 1 && k.OpenFiles() == 0 })

	// Item 11: opened again it has its data; with another size it has not.
	o = open(t, k, img)
	check(t, o, b, 0, len(b.data))
	o.Close()
	if n := b.fills.Load(); n != 3 {
		t.Errorf("%d READs of a warm object", n-3)
	}
	b.size = func() int64 { return 1 << 20 }
	o = open(t, k, img)
	check(t, o, b, 0, len(b.data))
	o.Close()
	if n := b.fills.Load(); n != 6 {
		t.Errorf("%d READs with another size, want 3", n-3)
	}
	until(t, "CLOSE", func() bool { return b.closes.Load() == 3 })
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	got := s.Stats()
	if want := (Stats{Requests: 12, Opens: 3, Closes: 3, Reads: 6, Filled: 6}); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if seen[OpOpen] != 3 || seen[OpRead] != 6 || seen[OpClose] != 3 {
		t.Errorf("observed %v", seen)
	}
}

// Item 7: mounts that share an object bring one OPEN and one CLOSE.
func TestSharedObject(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	start(t, k.Device(), handle(b), Options{})
	first, second := open(t, k, img), open(t, k, img)
	check(t, first, b, 0, len(b.data))
	first.Close()
	check(t, second, b, 0, len(b.data))
	if b.opens.Load() != 1 || b.closes.Load() != 0 || b.fills.Load() != 1 {
		t.Errorf("opens %d, closes %d, fills %d", b.opens.Load(), b.closes.Load(), b.fills.Load())
	}
	second.Close()
	until(t, "CLOSE", func() bool { return b.closes.Load() == 1 })
}

func TestRefusedOpen(t *testing.T) {
	for name, c := range map[string]struct {
		open func(ctx context.Context, b *blob) (Object, error)
		want syscall.Errno
	}{
		"errno":         {func(context.Context, *blob) (Object, error) { return nil, unix.ENOENT }, unix.ENOENT},
		"wrapped errno": {func(context.Context, *blob) (Object, error) { return nil, fmt.Errorf("x: %w", unix.ENOMEM) }, unix.ENOMEM},
		"error":         {func(context.Context, *blob) (Object, error) { return nil, errors.New("backend down") }, unix.EIO},
		"no errno":      {func(context.Context, *blob) (Object, error) { return nil, syscall.Errno(0) }, unix.EIO},
		"large errno":   {func(context.Context, *blob) (Object, error) { return nil, syscall.Errno(4096) }, unix.EIO},
		"nothing":       {func(context.Context, *blob) (Object, error) { return nil, nil }, unix.EIO},
		"panic":         {func(context.Context, *blob) (Object, error) { panic("oops") }, unix.EIO},
		"negative size": {func(_ context.Context, b *blob) (Object, error) { b.size = func() int64 { return -1 }; return b, nil }, unix.EIO},
		"huge size": {func(_ context.Context, b *blob) (Object, error) {
			b.size = func() int64 { return 1<<63 - 1 }
			return b, nil
		}, unix.EIO},
		"panic in Size": {func(_ context.Context, b *blob) (Object, error) {
			b.size = func() int64 { panic("oops") }
			return b, nil
		}, unix.EIO},
	} {
		t.Run(name, func(t *testing.T) {
			k := cachefilestest.New(t)
			b := newBlob(img, page)
			b.open = c.open
			s := start(t, k.Device(), handle(b), Options{})
			if _, err := k.Open(t.Context(), img); err != c.want {
				t.Errorf("got %v, want %v", err, c.want)
			}
			// Invariant 9: the file of a refused OPEN would keep its volume.
			until(t, "the file is closed", func() bool { return k.OpenFiles() == 0 })
			if err := s.stop(); err != nil {
				t.Error(err)
			}
			if got, want := b.closes.Load(), strings.Contains(name, "ize"); (got == 1) != want {
				t.Errorf("Close was called %d times", got)
			}
			if n := s.Stats().Refused; n != 1 {
				t.Errorf("refused %d", n)
			}
		})
	}
}

// Invariant 13, from the other side: a foreign mounter's names.
func TestInvalidKeyIsRefused(t *testing.T) {
	k := cachefilestest.New(t)
	bad := Key{Volume: "erofs,a/../b", Cookie: "x"}
	b := newBlob(bad, page)
	start(t, k.Device(), handle(b), Options{})
	if _, err := k.Open(t.Context(), bad); err != unix.EINVAL || b.opens.Load() != 0 {
		t.Errorf("%v, and the handler was asked %d times", err, b.opens.Load())
	}
}

// Invariant 12: the kernel asks for ever when a reader waits for an object that is
// refused. That must not spin, and it ends when the handler accepts.
func TestRefusedAgainAndAgain(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	var refuse atomic.Bool
	b.open = func(context.Context, *blob) (Object, error) {
		if refuse.Load() {
			return nil, unix.EIO
		}
		return b, nil
	}
	s := start(t, k.Device(), handle(b), Options{Handover: true})
	o := open(t, k, img)
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	refuse.Store(true)
	start(t, k.Device(), handle(b), Options{})
	read := later(func() error { return o.ReadAt(t.Context(), make([]byte, page), 0) })
	begin := time.Now()
	until(t, "refused ten times", func() bool { return b.opens.Load() >= 1+10 })
	if took := time.Since(begin); took < 200*time.Millisecond { // 1+2+4+...+128 ms
		t.Errorf("ten refusals in %v", took)
	}
	refuse.Store(false)
	if err := get(t, read); err != nil {
		t.Error(err)
	}
	o.Close()
}

// Item 6.
func TestPartialFill(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 128<<10)
	b.fill = func(_ context.Context, off, _ int64) error { return b.write(off, page) }
	s := start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	check(t, o, b, 0, len(b.data))
	if n := b.fills.Load(); n != 32 {
		t.Errorf("%d READs, want 32: a page each", n)
	}
	o.Close()
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}

// A Fill that fails completes its READ without data, which is EIO; the next
// read asks again.
func TestFailedFill(t *testing.T) {
	for name, fail := range map[string]func(context.Context, int64, int64) error{
		"error": func(context.Context, int64, int64) error { return errors.New("backend down") },
		"panic": func(context.Context, int64, int64) error { panic("oops") },
		"empty": func(context.Context, int64, int64) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			k := cachefilestest.New(t)
			b := newBlob(img, 128<<10)
			var broken atomic.Bool
			broken.Store(true)
			b.fill = func(ctx context.Context, off, n int64) error {
				if broken.Load() {
					return fail(ctx, off, n)
				}
				return b.write(off, n)
			}
			s := start(t, k.Device(), handle(b), Options{})
			o := open(t, k, img)
			fails(t, o, 0, page, unix.EIO)
			fails(t, o, 8192, page, unix.EIO)
			broken.Store(false)
			check(t, o, b, 0, len(b.data))
			o.Close()
			if err := s.stop(); err != nil {
				t.Error(err)
			}
			if logged := strings.Contains(s.log.String(), "read failed"); logged != (name != "empty") {
				t.Errorf("log: %s", s.log)
			}
		})
	}
}

// Every Fill of an object fails when it could not use its file, until it is
// opened again.
func TestFailedOpened(t *testing.T) {
	for name, opened := range map[string]func(context.Context, *File) error{
		"error": func(context.Context, *File) error { return errors.New("no") },
		"panic": func(context.Context, *File) error { panic("oops") },
	} {
		t.Run(name, func(t *testing.T) {
			k := cachefilestest.New(t)
			b := newBlob(img, page)
			b.opened = opened
			start(t, k.Device(), handle(b), Options{})
			o := open(t, k, img)
			fails(t, o, 0, page, unix.EIO)
			fails(t, o, 0, page, unix.EIO)
			if b.fills.Load() != 0 {
				t.Error("Fill was called")
			}
			o.Close()
			until(t, "closed", func() bool { return b.closes.Load() == 1 })
			b.opened = nil
			o = open(t, k, img)
			check(t, o, b, 0, page)
			o.Close()
		})
	}
}

// Invariant 8, race 1, item 3: the file can be used in Opened, when the kernel
// may not have attached it, and Fill waits for that.
func TestOpenedUsesTheFile(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	var runs [][2]int64
	b.opened = func(_ context.Context, f *File) error {
		if err := b.writeTo(f, 16<<10, 8<<10); err != nil {
			return err
		}
		return f.Data(64<<10, func(off, end int64) { runs = append(runs, [2]int64{off, end}) })
	}
	b.fill = func(_ context.Context, off, n int64) error {
		if runs == nil {
			t.Error("Fill before Opened has returned")
		}
		return b.write(off, n)
	}
	start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	check(t, o, b, 0, len(b.data))
	o.Close()
	if want := [][2]int64{{16 << 10, 24 << 10}}; !slices.Equal(runs, want) {
		t.Errorf("runs of data: %v, want %v", runs, want)
	}
}

// Race 13, invariant 9: no child inherits the file.
func TestFileIsCloseOnExec(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	b.opened = func(_ context.Context, f *File) error {
		if flags, err := unix.FcntlInt(uintptr(f.FD()), unix.F_GETFD, 0); err != nil || flags != unix.FD_CLOEXEC {
			t.Errorf("flags %#x, %v", flags, err)
		}
		return nil
	}
	start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	check(t, o, b, 0, page)
	o.Close()
}

// Disk full: the filler learns it, the reader gets EIO, and it passes.
func TestDiskFull(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	var got atomic.Value
	b.fill = func(_ context.Context, off, n int64) error {
		err := b.write(off, n)
		if err != nil {
			got.Store(err)
		}
		return err
	}
	start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	k.FailWrites(unix.ENOSPC)
	fails(t, o, 0, page, unix.EIO)
	if err, _ := got.Load().(error); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("WriteAt: %v", err)
	}
	k.FailWrites(nil)
	check(t, o, b, 0, page)
	o.Close()
}

func TestCull(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	d := k.Device()
	start(t, d, handle(b), Options{})
	if used, err := d.InUse(img); used || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("of a missing object: %v, %v", used, err)
	}
	for _, round := range []int{1, 2} {
		o := open(t, k, img)
		check(t, o, b, 0, page)
		if round == 2 {
			if used, err := d.InUse(img); !used || err != nil {
				t.Errorf("of a live object: %v, %v", used, err)
			}
			if err := d.Cull(img); !errors.Is(err, ErrInUse) {
				t.Errorf("cull a live object: %v", err)
			}
			if err := d.CullVolume(img.Volume); !errors.Is(err, ErrInUse) {
				t.Errorf("cull a live volume: %v", err)
			}
		}
		o.Close()
	}
	if used, err := d.InUse(img); used || err != nil {
		t.Errorf("of a closed object: %v, %v", used, err)
	}
	if err := d.Cull(img); err != nil || k.Has(img) {
		t.Errorf("cull: %v, still there: %v", err, k.Has(img))
	}
	if err := d.Cull(img); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("cull again: %v", err)
	}
	open(t, k, img).Close()
	if err := d.CullVolume(img.Volume); err != nil || k.Has(img) {
		t.Errorf("cull the volume: %v, still there: %v", err, k.Has(img))
	}
	if err := d.Cull(Key{"erofs,../..", "etc"}); err == nil || errors.Is(err, syscall.ENOENT) {
		t.Errorf("cull outside of the cache: %v", err)
	}
}
