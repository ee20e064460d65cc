package cachefiles_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
	"github.com/erofsd/erofsd/internal/kernel"
)

var errClosedFile = os.ErrClosed

// The end of Serve gives what is under way a moment, and fails the rest.
func TestEnd(t *testing.T) {
	k := cachefilestest.New(t)
	quick, stuck := newBlob(img, page), newBlob(Key{img.Volume, "stuck"}, 64<<10)
	release := make(chan struct{})
	quick.fill = func(_ context.Context, off, n int64) error { <-release; return quick.write(off, n) }
	stuck.fill = func(ctx context.Context, _, _ int64) error { <-ctx.Done(); return ctx.Err() }
	opening := newBlob(Key{img.Volume, "opening"}, page)
	opening.open = func(ctx context.Context, _ *blob) (Object, error) { <-ctx.Done(); return nil, ctx.Err() }
	s := start(t, k.Device(), handle(quick, stuck, opening), Options{MaxInFlight: 2, Grace: 200 * time.Millisecond})
	a, b := open(t, k, quick.key), open(t, k, stuck.key)
	ra := later(func() error { return a.Ask(t.Context(), 0, page) })
	until(t, "it fills", func() bool { return quick.active.Load() == 1 })
	rb := later(func() error { return b.Ask(t.Context(), 0, page) })
	until(t, "it fills", func() bool { return stuck.active.Load() == 1 })
	queued := later(func() error { return b.Ask(t.Context(), page, page) })
	opened := later(func() error { _, err := k.Open(t.Context(), opening.key); return err })
	until(t, "all wait", func() bool { return s.Stats().InFlight == 3 && opening.opens.Load() == 1 })
	s.end()
	close(release)
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	for _, r := range []<-chan error{ra, rb, queued} {
		if err := get(t, r); err != nil {
			t.Error(err)
		}
	}
	if err := get(t, opened); err != unix.EIO {
		t.Errorf("OPEN: %v", err)
	}
	if got := s.Stats(); got.Filled != 1 || got.Failed != 2 || got.Refused != 1 || got.Dropped != 0 {
		t.Errorf("%+v", got)
	}
	if quick.closes.Load() != 1 || stuck.closes.Load() != 1 || k.OpenFiles() != 0 {
		t.Error("something was not closed")
	}
}

func TestServeOnceAtATime(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	d := k.Device()
	s := start(t, d, handle(b), Options{Handover: true})
	o := open(t, k, img)
	check(t, o, b, 0, page)
	if err := s.Serve(t.Context()); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("Serve while serving: %v", err)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	// Another server on the same device goes on.
	again := start(t, d, handle(b), Options{})
	if err := o.Ask(t.Context(), 0, page); err != nil {
		t.Error(err)
	}
	if n := again.Stats().Opens; n != 1 {
		t.Errorf("%d OPENs", n)
	}
	o.Close()
}

// Item 9, invariants 4 and 11, race 9: the daemon dies with somebody else holding
// the device; another one restores, and every reader gets its data.
func TestRestart(t *testing.T) {
	for name, handover := range map[string]bool{"killed": false, "handover": true} {
		t.Run(name, func(t *testing.T) {
			k := cachefilestest.New(t)
			idle, reading := newBlob(Key{img.Volume, "idle"}, page), newBlob(Key{img.Volume, "reading"}, 64<<10)
			opening := newBlob(Key{img.Volume, "opening"}, page)
			reading.fill = func(ctx context.Context, _, _ int64) error { <-ctx.Done(); return ctx.Err() }
			opening.open = func(ctx context.Context, _ *blob) (Object, error) { <-ctx.Done(); return nil, ctx.Err() }
			h := handle(idle, reading, opening)
			s := start(t, k.Device(), h, Options{Handover: true, Grace: time.Millisecond, MaxInFlight: 1})
			a, b := open(t, k, idle.key), open(t, k, reading.key)
			reads := []<-chan error{
				later(func() error { return b.ReadAt(t.Context(), make([]byte, page), 0) }),
				later(func() error { return b.ReadAt(t.Context(), make([]byte, page), 8192) }), // queued
			}
			var o *cachefilestest.Object
			opened := later(func() (err error) { o, err = k.Open(t.Context(), opening.key); return err })
			until(t, "all were read", func() bool { return s.Stats().InFlight == 2 && opening.opens.Load() == 1 })
			if handover {
				if err := s.stop(); err != nil {
					t.Error(err)
				}
			} else {
				k.Kill()
				if err := s.wait(); err == nil {
					t.Error("Serve of a dead device ends without an error")
				}
			}
			if got := s.Stats(); got.Dropped != 2 || got.Failed != 0 || got.Refused != 0 {
				t.Errorf("%+v", got)
			}
			// READ unread: it comes while nobody serves.
			reads = append(reads, later(func() error { return b.ReadAt(t.Context(), make([]byte, page), 16384) }))
			until(t, "it is asked for", func() bool { return k.Pending() == 4 })

			reading.fill, opening.open = nil, nil
			d := k.Device()
			if err := d.Restore(); err != nil {
				t.Fatal(err)
			}
			s = start(t, d, h, Options{})
			for _, r := range reads {
				if err := get(t, r); err != nil {
					t.Error(err)
				}
			}
			if err := get(t, opened); err != nil {
				t.Fatal(err)
			}
			check(t, a, idle, 0, page)
			check(t, b, reading, 0, len(reading.data))
			check(t, o, opening, 0, page)
			for _, o := range []*cachefilestest.Object{a, b, o} {
				o.Close()
			}
			if err := s.stop(); err != nil {
				t.Error(err)
			}
			if got := s.Stats(); got.Opens != 3 || got.Lost != 0 || got.Unknown != 0 {
				t.Errorf("%+v", got)
			}
		})
	}
}

// Item 16: restore is missing.
func TestRestoreNotSupported(t *testing.T) {
	k := cachefilestest.New(t)
	k.NoRestore()
	err := k.Device().Restore()
	if e := (*kernel.UnsupportedError)(nil); !errors.As(err, &e) || !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("%v", err)
	}
}

// Item 16: the read of one request fails, and the others go on.
func TestReadFails(t *testing.T) {
	for _, errno := range []error{unix.EMFILE, unix.ENFILE, unix.EEXIST, unix.ENOMEM} {
		k := cachefilestest.New(t)
		b := newBlob(img, page)
		s := start(t, k.Device(), handle(b), Options{})
		k.FailNextOpen(errno)
		if _, err := k.Open(t.Context(), img); err != errno {
			t.Errorf("OPEN: %v", err)
		}
		o := open(t, k, img)
		check(t, o, b, 0, page)
		o.Close()
		if got := s.Stats(); got.ReadFails != 1 {
			t.Errorf("%v: %+v", errno, got)
		}
	}
}

// The cache dies: Serve says so and leaves nothing behind.
func TestCacheDies(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	b.fill = func(ctx context.Context, _, _ int64) error { <-ctx.Done(); return ctx.Err() }
	s := start(t, k.Device(), handle(b), Options{Grace: time.Hour})
	o := open(t, k, img)
	read := later(func() error { return o.ReadAt(t.Context(), make([]byte, page), 0) })
	until(t, "Fill runs", func() bool { return b.active.Load() == 1 })
	k.Die()
	if err := s.wait(); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "unmount") {
		t.Errorf("Serve: %v", err)
	}
	if err := get(t, read); err != unix.EIO {
		t.Errorf("read: %v", err)
	}
}

// The device is closed under Serve.
func TestDeviceClosed(t *testing.T) {
	k := cachefilestest.New(t)
	d := k.Device()
	s := start(t, d, handle(), Options{})
	for range 2 {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := s.wait(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
	if err := d.Restore(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Restore: %v", err)
	}
}

func TestPollCull(t *testing.T) {
	k := cachefilestest.New(t)
	k.WantCull(true)
	s := start(t, k.Device(), handle(), Options{})
	until(t, "it is seen", func() bool { return s.Stats().PollCull == 1 })
}

// What is not a message gets what answer can be given, and harms nobody.
func TestMalformed(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	s := start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	const id = 1 << 30
	withFD := k.Send(append(cachefilestest.OpenMessage(id, 77, -1, "erofs,x", "x"), 0), true)
	without := k.Send(cachefilestest.OpenMessage(id+1, 77, -1, "erofs,x", "x"), false)
	known := k.Send(cachefilestest.ReadMessage(id+2, o.ID(), 1<<63, page), false)
	unknown := k.Send(cachefilestest.ReadMessage(id+3, 77, 1<<63, page), false)
	stale := k.Send(cachefilestest.ReadMessage(id+4, 77, 0, page), false)
	k.Send(cachefilestest.Message(id+5, cachefilestest.OpClose, 77), false)
	k.Send(cachefilestest.Message(id+6, 9, o.ID()), false)
	k.Send([]byte{1, 2, 3}, false)
	k.Send(slices.Repeat([]byte{0xff}, 1000), false)
	check(t, o, b, 0, page)
	until(t, "the file is closed", func() bool { return k.OpenFiles() == 1 })
	for name, got := range map[string]int{
		"OPEN with a descriptor": withFD.Answers(), "OPEN without one": without.Answers(), "READ of a known object": known.Answers(),
	} {
		if got != 1 {
			t.Errorf("%s: %d answers, want 1", name, got)
		}
	}
	if unknown.Answers()+stale.Answers() != 0 {
		t.Error("READs of unknown objects were answered, through whose file?")
	}
	o.Close()
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if got := s.Stats(); got.Malformed != 7 || got.Unknown != 2 {
		t.Errorf("%+v", got)
	}
}

// An OPEN whose object's number is known already ends the older object.
func TestReplacedObject(t *testing.T) {
	k := cachefilestest.New(t)
	b, other := newBlob(img, page), newBlob(Key{img.Volume, "other"}, page)
	s := start(t, k.Device(), handle(b, other), Options{})
	o := open(t, k, img)
	const id = 1 << 30
	sent := k.Send(cachefilestest.OpenMessage(id, o.ID(), 0, other.key.Volume, other.key.Cookie), true)
	until(t, "the older one is closed", func() bool { return b.closes.Load() == 1 })
	until(t, "the OPEN is answered", func() bool { return sent.Answers() == 1 })
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if other.closes.Load() != 1 || b.closes.Load() != 1 {
		t.Errorf("closed %d and %d times", other.closes.Load(), b.closes.Load())
	}
	o.Close()
}

// The device of another process is taken over whatever mode it is in.
func TestNewDevice(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	fd, err := unix.Dup(int(r.Fd())) // blocking, inherited by children
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	d, err := NewDevice(os.NewFile(uintptr(fd), "device"), "/cache")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	conn, err := d.File().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = conn.Control(func(fd uintptr) {
		inherit, _ := unix.FcntlInt(fd, unix.F_GETFD, 0)
		mode, _ := unix.FcntlInt(fd, unix.F_GETFL, 0)
		if inherit != unix.FD_CLOEXEC || mode&unix.O_NONBLOCK == 0 {
			t.Errorf("flags %#x, %#x", inherit, mode)
		}
	})
	if err != nil || d.Dir() != "/cache" {
		t.Error(err, d.Dir())
	}
	if _, err := unix.Write(int(w.Fd()), []byte("not a cachefiles message")); err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "regular")
	if err != nil {
		t.Fatal(err)
	}
	if d, err := NewDevice(f, "/cache"); err == nil {
		d.Close()
		t.Error("a regular file, which cannot be polled, is taken for a device")
	}
	if _, err := f.Write([]byte{0}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the file that was refused is not closed: %v", err)
	}
}
