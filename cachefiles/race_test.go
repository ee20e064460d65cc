package cachefiles_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
)

// Invariant 6: the kernel has no deadline, so we have one, and it does not depend
// on the handler.
func TestDeadline(t *testing.T) {
	const deadline = 50 * time.Millisecond
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	stuck := make(chan struct{})
	b.open = func(context.Context, *blob) (Object, error) { <-stuck; return b, nil }
	s := start(t, k.Device(), handle(b), Options{Deadline: deadline})
	if _, err := k.Open(t.Context(), img); err != unix.EIO {
		t.Errorf("OPEN: %v", err)
	}
	until(t, "the file is closed", func() bool { return k.OpenFiles() == 0 })
	close(stuck)
	until(t, "the object that came late is closed", func() bool { return b.closes.Load() == 1 })

	b.open = nil
	b.opened = func(ctx context.Context, _ *File) error { <-ctx.Done(); return ctx.Err() }
	o := open(t, k, img)
	fails(t, o, 0, page, unix.EIO)
	o.Close()
	until(t, "closed", func() bool { return b.closes.Load() == 2 })

	b.opened = nil
	stuck = make(chan struct{})
	b.fill = func(_ context.Context, off, n int64) error { <-stuck; return b.write(off, n) }
	o = open(t, k, img)
	fails(t, o, 0, page, unix.EIO)
	close(stuck)
	until(t, "the late Fill has ended", func() bool { return b.active.Load() == 0 })
	check(t, o, b, 0, page) // its data is there all the same
	o.Close()
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if got := s.Stats(); got.Failed != 2 || got.Lost != 0 {
		t.Errorf("%+v", got)
	}
}

// Races 2 and 4: a CLOSE stops the fills of its object and waits for them before
// the object is closed; their READs are not answered, for the numbers may be
// others' by then.
func TestCloseDuringFill(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	b.fill = func(ctx context.Context, off, n int64) error {
		<-ctx.Done()
		if err := b.write(off, n); !errors.Is(err, unix.ENOBUFS) || !errors.Is(err, ErrWithdrawn) {
			t.Errorf("write to a withdrawn file: %v", err)
		}
		return nil // not even success is answered
	}
	b.close = func() error {
		if n := b.active.Load(); n != 0 {
			t.Errorf("Close while %d fills run", n)
		}
		if k.OpenFiles() != 1 {
			t.Error("the file was closed before Close")
		}
		return nil
	}
	s := start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	read := later(func() error { return o.ReadAt(t.Context(), make([]byte, page), 0) })
	until(t, "Fill runs", func() bool { return b.active.Load() == 1 })
	o.Close()
	if err := get(t, read); err != unix.EIO {
		t.Errorf("read: %v", err)
	}
	until(t, "the file is closed", func() bool { return k.OpenFiles() == 0 })
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if got := s.Stats(); got.Dropped != 1 || got.Lost != 0 || b.closes.Load() != 1 {
		t.Errorf("%+v, closed %d times", got, b.closes.Load())
	}
}

// Race 2: whoever kept the file after Close of its object, as a prefetch might, gets
// an error, and never somebody else's descriptor (race 3).
func TestFileAfterClose(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, page)
	start(t, k.Device(), handle(b), Options{})
	open(t, k, img).Close()
	until(t, "closed", func() bool { return k.OpenFiles() == 0 })
	if err := b.write(0, page); !errors.Is(err, errClosedFile) {
		t.Errorf("write: %v", err)
	}
	if err := b.file.Load().Data(page, nil); !errors.Is(err, errClosedFile) {
		t.Errorf("Data: %v", err)
	}
	if err := b.file.Load().Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
}

// Race 6: a key is opened again while its older object is not closed yet.
func TestTwoObjectsOfAKey(t *testing.T) {
	k := cachefilestest.New(t)
	old, young := newBlob(img, 64<<10), newBlob(img, 64<<10)
	old.fill = func(ctx context.Context, _, _ int64) error { <-ctx.Done(); return ctx.Err() }
	hold := make(chan struct{})
	old.close = func() error { <-hold; return nil }
	h := handle(old)
	start(t, k.Device(), h, Options{})
	first := open(t, k, img)
	read := later(func() error { return first.ReadAt(t.Context(), make([]byte, page), 0) })
	until(t, "Fill runs", func() bool { return old.active.Load() == 1 })
	h.mu.Lock()
	h.list[img] = young
	h.mu.Unlock()
	first.Close()
	second := open(t, k, img)
	check(t, second, young, 0, len(young.data))
	close(hold)
	if err := get(t, read); err != unix.EIO {
		t.Error(err)
	}
	second.Close()
}

// Race 7: the answer to a READ whose reader was killed is refused and does not matter.
func TestKilledReader(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	hold := make(chan struct{})
	b.fill = func(_ context.Context, off, n int64) error { <-hold; return b.write(off, n) }
	s := start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	ctx, kill := context.WithCancel(t.Context())
	read := later(func() error { return o.ReadAt(ctx, make([]byte, page), 0) })
	until(t, "Fill runs", func() bool { return b.active.Load() == 1 })
	kill()
	if err := get(t, read); err != context.Canceled {
		t.Error(err)
	}
	close(hold)
	until(t, "the answer is refused", func() bool { return s.Stats().Lost == 1 })
	check(t, o, b, 0, len(b.data))
	o.Close()
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}

// Race 8: READs that overlap are both answered.
func TestOverlappingReads(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	hold := make(chan struct{})
	b.fill = func(_ context.Context, off, n int64) error { <-hold; return b.write(off, n) }
	start(t, k.Device(), handle(b), Options{})
	o := open(t, k, img)
	var reads []<-chan error
	for _, r := range [][2]int64{{0, 64 << 10}, {0, page}, {page, 3 * page}, {0, 64 << 10}} {
		reads = append(reads, later(func() error { return o.Ask(t.Context(), r[0], r[1]) }))
	}
	until(t, "all are under way", func() bool { return b.active.Load() == 4 })
	close(hold)
	for _, r := range reads {
		if err := get(t, r); err != nil {
			t.Error(err)
		}
	}
	check(t, o, b, 0, len(b.data))
	o.Close()
}

// Invariant 14, item 14: neither OPENs that wait nor READs beyond the limits keep
// the server from reading a CLOSE.
func TestCloseUnderLoad(t *testing.T) {
	k := cachefilestest.New(t)
	idle := newBlob(Key{img.Volume, "idle"}, page)
	busy := newBlob(Key{img.Volume, "busy"}, 1<<20)
	hold := make(chan struct{})
	busy.fill = func(_ context.Context, off, n int64) error { <-hold; return busy.write(off, n) }
	list := []*blob{idle, busy}
	for i := range 300 {
		slow := newBlob(Key{img.Volume, fmt.Sprint("slow", i)}, page)
		slow.open = func(context.Context, *blob) (Object, error) { <-hold; return slow, nil }
		list = append(list, slow)
	}
	start(t, k.Device(), handle(list...), Options{MaxInFlight: 4})
	doomed, o := open(t, k, idle.key), open(t, k, busy.key)
	var waiting []<-chan error
	for i := range 100 {
		waiting = append(waiting, later(func() error { return o.Ask(t.Context(), int64(i)*page, page) }))
	}
	for _, b := range list[2:] {
		waiting = append(waiting, later(func() error {
			o, err := k.Open(t.Context(), b.key)
			if err == nil {
				o.Close()
			}
			return err
		}))
	}
	until(t, "the OPENs wait", func() bool { return list[len(list)-1].opens.Load() == 1 && list[2].opens.Load() == 1 })
	doomed.Close()
	until(t, "CLOSE is read", func() bool { return idle.closes.Load() == 1 }) // the others wait still
	close(hold)
	for _, w := range waiting {
		if err := get(t, w); err != nil {
			t.Error(err)
		}
	}
	o.Close()
}

func TestLimits(t *testing.T) {
	for name, c := range map[string]struct {
		o    Options
		n    int64
		most int64
	}{
		"number":        {Options{MaxInFlight: 3}, page, 3},
		"bytes":         {Options{MaxInFlightBytes: 2*page + 1}, page, 2},
		"one too large": {Options{MaxInFlightBytes: page}, 2 * page, 1},
	} {
		t.Run(name, func(t *testing.T) {
			k := cachefilestest.New(t)
			b := newBlob(img, 1<<20)
			step := make(chan struct{})
			var most atomic.Int64
			b.fill = func(_ context.Context, off, n int64) error {
				for now := b.active.Load(); now > most.Load(); now = b.active.Load() {
					most.Store(now)
				}
				<-step
				return b.write(off, n)
			}
			s := start(t, k.Device(), handle(b), c.o)
			o := open(t, k, img)
			var reads []<-chan error
			for i := range int64(20) {
				reads = append(reads, later(func() error { return o.Ask(t.Context(), i*c.n, c.n) }))
			}
			until(t, "all are read", func() bool { return s.Stats().InFlight == 20 })
			for range 20 {
				until(t, "the limit is used", func() bool { return b.active.Load() == min(c.most, s.Stats().InFlight) })
				before := s.Stats().InFlight
				step <- struct{}{}
				until(t, "one is answered", func() bool { return s.Stats().InFlight == before-1 })
			}
			for _, r := range reads {
				if err := get(t, r); err != nil {
					t.Error(err)
				}
			}
			if most.Load() != c.most {
				t.Errorf("%d fills at once, want %d", most.Load(), c.most)
			}
			o.Close()
		})
	}
}

// READs that wait for a place have a deadline too, though nothing ends that has one.
func TestQueueDeadline(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	stuck := make(chan struct{})
	b.fill = func(context.Context, int64, int64) error { <-stuck; return nil }
	s := start(t, k.Device(), handle(b), Options{MaxInFlight: 1, Deadline: 50 * time.Millisecond})
	o := open(t, k, img)
	first := later(func() error { return o.Ask(t.Context(), 0, page) })
	until(t, "it has the only place", func() bool { return b.active.Load() == 1 })
	if err := get(t, later(func() error { return o.Ask(t.Context(), page, page) })); err != nil {
		t.Error(err)
	}
	if err := get(t, first); err != nil {
		t.Error(err)
	}
	// More come while the only place is still taken.
	fails(t, o, 0, page, unix.EIO)
	fails(t, o, 0, page, unix.EIO)
	if n := b.fills.Load(); n != 1 {
		t.Errorf("%d fills", n)
	}
	close(stuck)
	o.Close()
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if got := s.Stats(); got.Failed != 4 {
		t.Errorf("%+v", got)
	}
}

// An object that is closed takes its queued READs with it.
func TestCloseDropsQueue(t *testing.T) {
	k := cachefilestest.New(t)
	b := newBlob(img, 64<<10)
	b.fill = func(ctx context.Context, _, _ int64) error { <-ctx.Done(); return ctx.Err() }
	s := start(t, k.Device(), handle(b), Options{MaxInFlight: 1})
	o := open(t, k, img)
	for i := range int64(3) {
		go func() { _ = o.Ask(t.Context(), i*page, page) }()
	}
	until(t, "all are read", func() bool { return s.Stats().InFlight == 3 })
	o.Close()
	until(t, "none is left", func() bool { return s.Stats().InFlight == 0 })
	if got := s.Stats(); got.Dropped != 3 || b.fills.Load() != 1 {
		t.Errorf("%+v, %d fills", got, b.fills.Load())
	}
}
