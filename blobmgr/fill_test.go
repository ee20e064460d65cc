package blobmgr

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/chunk"
)

func TestFillRanges(t *testing.T) {
	x := makeBlob(t, 1, lengths(1, 60))
	s := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	size := int64(len(x.plain))
	if b.Size() != size {
		t.Fatalf("size %d, want %d", b.Size(), size)
	}
	for _, c := range []struct{ off, n int64 }{
		{0, 0}, {0, 1}, {4096, 4096}, {size - 1, 1}, {size - 4096, 1 << 20}, {size, 4096}, {size + 5, 0}, {0, size}, {0, size + 4096},
	} {
		fill(t, b, x, c.off, c.n)
	}
	for _, c := range []struct{ off, n int64 }{{-1, 2}, {0, -1}} {
		if err := b.Fill(t.Context(), c.off, c.n); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Fill(%d, %d): %v", c.off, c.n, err)
		}
		if b.Ready(c.off, c.n) {
			t.Errorf("Ready(%d, %d)", c.off, c.n)
		}
	}
	if st := b.Stats(); st.Present != size || st.Needed != size || !st.Complete && st.Corrupt != 0 {
		t.Errorf("%+v", st)
	}
}

// Only what was asked for is read, neighbours together.
func TestFillMergesNeighbours(t *testing.T) {
	x := makeBlob(t, 2, lengths(2, 200))
	s := &store{stored: x.stored}
	b := open(t, newManager(t, quietOptions()), x.source(s))
	defer closeBlob(t, b)
	s.requests()
	fill(t, b, x, 0, 256<<10)
	log, _ := s.requests()
	if len(log) != 1 {
		t.Errorf("%d requests for one range", len(log))
	}
	fill(t, b, x, 0, b.Size())
	log, total := s.requests()
	for _, r := range log {
		if r.n > maxRequest {
			t.Errorf("request of %d bytes", r.n)
		}
	}
	if limit := x.entry.DataEnd(); total > limit || len(log) > int(limit/maxRequest)*2+2 {
		t.Errorf("%d requests, %d bytes of %d", len(log), total, limit)
	}
}

// 64 fillers of everything fetch each unit once.
func TestEachUnitIsFetchedOnce(t *testing.T) {
	x := makeBlob(t, 3, lengths(3, 400))
	s := &store{stored: x.stored}
	b := open(t, newManager(t, Options{CompletionDelay: time.Millisecond}), x.source(s))
	defer closeBlob(t, b)
	s.requests()
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			step := int64(4096 * (1 + i%32))
			for off := int64(0); off < b.Size(); off += step {
				if err := b.Fill(t.Context(), (off+int64(i)*131072)%b.Size(), step); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	<-b.Done()
	check(t, b, x, 0, b.Size())
	log, _ := s.requests()
	count := make([]int, b.table.Units())
	for u := range count {
		x := b.table.Unit(u)
		for _, r := range log {
			if r.off <= x.COff && x.COff+x.CLen <= r.off+r.n {
				count[u]++
			}
		}
	}
	twice := int64(0)
	for u, n := range count {
		if n == 0 {
			t.Errorf("unit %d was never fetched", u)
		}
		if n > 1 { // between units of a merged request
			twice += b.table.Unit(u).CLen * int64(n-1)
		}
	}
	if twice > x.entry.DataEnd()/20 {
		t.Errorf("%d of %d bytes fetched again", twice, x.entry.DataEnd())
	}
}

// Invariant 2: no byte reaches a cache file before its chunk's digest matched.
func TestVerifiedFirst(t *testing.T) {
	x := makeBlob(t, 4, lengths(4, 40))
	s := &store{stored: x.stored}
	b := open(t, newManager(t, quietOptions()), x.source(s))
	defer closeBlob(t, b)
	victim := b.table.Unit(7)
	bad := func(_ context.Context, p []byte, off int64) error {
		if i := victim.COff - off; i >= 0 && i < int64(len(p)) {
			p[i+victim.CLen/2] ^= 1
		}
		return nil
	}
	s.setFault(bad)
	err := b.Fill(t.Context(), 0, b.Size())
	if corrupt := (*chunk.CorruptError)(nil); !errors.As(err, &corrupt) || corrupt.Chunk != 7 || !errors.Is(err, chunk.ErrCorrupt) {
		t.Fatalf("Fill: %v", err)
	}
	got, err := os.ReadFile(b.Path())
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(x.plain)
	clear(want[victim.Off : victim.Off+victim.Len])
	if !bytes.Equal(got, want) {
		t.Error("the cache file holds something else than the good units")
	}
	if st := b.Stats(); st.Corrupt != 1 || st.Present != b.Size()-victim.Len {
		t.Errorf("%+v", st)
	}
	s.setFault(nil)
	s.requests()
	fill(t, b, x, 0, b.Size())
	if _, n := s.requests(); n != victim.CLen {
		t.Errorf("%d bytes fetched again, want %d: good units of the flight are kept", n, victim.CLen)
	}
}

// Invariant 3: written, then marked, then answered.
func TestWrittenThenMarkedThenAnswered(t *testing.T) {
	x := makeBlob(t, 5, []int{8192, 8192})
	s := &store{stored: x.stored}
	var b *Blob
	var early atomic.Bool
	answered := make(chan struct{})
	o := quietOptions()
	o.wrap = func(f cacheFile) cacheFile {
		return &hookedFile{cacheFile: f, write: func(off int64, n int) error {
			select {
			case <-answered:
				early.Store(true)
			default:
			}
			if b.Ready(off, int64(n)) {
				early.Store(true)
			}
			return nil
		}}
	}
	b = open(t, newManager(t, o), x.source(s))
	defer closeBlob(t, b)
	fill(t, b, x, 0, 8192)
	close(answered)
	if early.Load() {
		t.Error("marked or answered before it was written")
	}
}

// A hookedFile is a cache file whose writes may fail.
type hookedFile struct {
	cacheFile
	write func(off int64, n int) error
}

func (f *hookedFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.write(off, len(p)); err != nil {
		n, _ := f.cacheFile.WriteAt(p[:len(p)/2], off) // as a full disk does
		return n, err
	}
	return f.cacheFile.WriteAt(p, off)
}

// Invariant 4: no lock is held across I/O: while a read and a write hang, everything
// else answers.
func TestNoLockOverWaiting(t *testing.T) {
	x := makeBlob(t, 6, []int{8192, 8192, 8192, 100 << 10, 8192})
	hang := make(chan struct{})
	hanging := make(chan struct{}, 2)
	s := &store{stored: x.stored}
	o := quietOptions()
	var first atomic.Bool
	o.wrap = func(f cacheFile) cacheFile {
		return &hookedFile{cacheFile: f, write: func(off int64, n int) error {
			if off == 0 {
				hanging <- struct{}{}
				<-hang
			}
			return nil
		}}
	}
	m := newManager(t, o)
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	s.setFault(func(_ context.Context, _ []byte, off int64) error {
		if off == b.table.Unit(4).COff && first.CompareAndSwap(false, true) {
			hanging <- struct{}{}
			<-hang
		}
		return nil
	})
	var wg sync.WaitGroup
	for _, u := range []int{0, 4} {
		wg.Go(func() {
			if err := b.Fill(t.Context(), b.table.Unit(u).Off, 1); err != nil {
				t.Error(err)
			}
		})
	}
	<-hanging
	<-hanging
	if b.Ready(0, 4096) {
		t.Error("ready before it is written")
	}
	b.Stats()
	b.Done()
	if len(m.memory.workers) > 0 { // the hanging write has one
		fill(t, b, x, b.table.Unit(2).Off, 4096)
	}
	again := open(t, m, x.source(s))
	close(hang)
	wg.Wait()
	closeBlob(t, again)
}

// Invariant 6: every wait selects on ctx, and the last leaver cancels the fetch.
func TestAWaiterMayLeave(t *testing.T) {
	x := makeBlob(t, 7, []int{8192, 8192})
	s := &store{stored: x.stored}
	entered, left := make(chan struct{}, 1), make(chan error, 1)
	b := open(t, newManager(t, quietOptions()), x.source(s))
	defer closeBlob(t, b)
	s.setFault(func(ctx context.Context, _ []byte, _ int64) error {
		entered <- struct{}{}
		<-ctx.Done()
		left <- ctx.Err()
		return ctx.Err()
	})
	ctx1, cancel1 := context.WithCancel(t.Context())
	ctx2, cancel2 := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	go func() { errs <- b.Fill(ctx1, 0, 4096) }()
	<-entered
	go func() { errs <- b.Fill(ctx2, 0, 8192) }()
	for waiters := 0; waiters < 2; time.Sleep(time.Millisecond) {
		b.mu.Lock()
		waiters = b.filling[0].waiters
		b.mu.Unlock()
	}
	cancel1()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("first leaver: %v", err)
	}
	select {
	case <-left:
		t.Fatal("the fetch was cancelled with a waiter left")
	case <-time.After(20 * time.Millisecond):
	}
	cancel2()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("last leaver: %v", err)
	}
	<-left
	s.setFault(nil)
	fill(t, b, x, 0, 8192)
}

// Invariant 8: buffers come from one pool with a limit, and goroutines are as few as
// requests.
func TestBounded(t *testing.T) {
	lens := make([]int, 64)
	for i := range lens {
		lens[i] = 1 << 20
	}
	x := makeBlob(t, 8, lens)
	s := &store{stored: x.stored}
	o := quietOptions()
	o.MemoryLimit = minMemory
	b := open(t, newManager(t, o), x.source(s))
	defer closeBlob(t, b)
	var now, most atomic.Int64
	s.setFault(func(_ context.Context, p []byte, _ int64) error {
		n := now.Add(int64(len(p)))
		for {
			if old := most.Load(); n <= old || most.CompareAndSwap(old, n) {
				break
			}
		}
		time.Sleep(time.Millisecond)
		now.Add(-int64(len(p)))
		return nil
	})
	var wg sync.WaitGroup
	for i := range lens {
		wg.Go(func() {
			if err := b.Fill(t.Context(), int64(i)<<20, 1<<20); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	check(t, b, x, 0, b.Size())
	if most.Load() > minMemory {
		t.Errorf("%d bytes in flight, limit %d", most.Load(), minMemory)
	}
}

func TestUnknownChunksAreNeverFilled(t *testing.T) {
	x := makeBlob(t, 9, []int{8192, 8192, 8192})
	s := &store{stored: x.stored}
	src := x.source(s)
	src.Digests = []ChunkDigest{x.digests[0], x.digests[2]}
	b := open(t, newManager(t, Options{CompletionDelay: time.Millisecond}), src)
	defer closeBlob(t, b)
	if err := b.Fill(t.Context(), 0, 12288); err == nil {
		t.Error("a range without digests was filled")
	}
	fill(t, b, x, 0, 8192)
	fill(t, b, x, 16384, 8192)
	<-b.Done()
	if b.Ready(8192, 4096) {
		t.Error("a chunk without digest is present")
	}
	if st := b.Stats(); !st.Complete || st.Present != 16384 || st.Needed != 16384 {
		t.Errorf("%+v", st)
	}
}

func TestFillOfPresentRangeDoesNotAllocate(t *testing.T) {
	x := makeBlob(t, 10, lengths(10, 50))
	b := open(t, newManager(t, quietOptions()), x.source(&store{stored: x.stored}))
	defer closeBlob(t, b)
	fill(t, b, x, 0, b.Size())
	ctx := t.Context()
	n := testing.AllocsPerRun(100, func() {
		if !b.Ready(8192, 128<<10) || b.Fill(ctx, 8192, 128<<10) != nil {
			t.Fatal("not present")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestNextSourceOnError(t *testing.T) {
	x := makeBlob(t, 11, lengths(11, 30))
	good := &store{stored: x.stored}
	bad := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(good))
	defer closeBlob(t, b)
	again := open(t, m, x.source(bad)) // newest first
	defer closeBlob(t, again)
	bad.setFault(func(_ context.Context, p []byte, _ int64) error { p[len(p)/2] ^= 1; return nil })
	fill(t, b, x, 0, b.Size())
	bad.setFault(func(context.Context, []byte, int64) error { return errors.New("gone") })
	if log, _ := bad.requests(); len(log) == 0 {
		t.Error("the newest source was not asked")
	}
	if b.Stats().Corrupt == 0 {
		t.Error("wrong bytes were not counted")
	}
}

func TestFillAfterClose(t *testing.T) {
	x := makeBlob(t, 12, []int{8192, 8192})
	s := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(s))
	entered := make(chan struct{})
	s.setFault(func(ctx context.Context, _ []byte, _ int64) error {
		close(entered)
		<-ctx.Done()
		return ctx.Err()
	})
	err := make(chan error)
	go func() { err <- b.Fill(t.Context(), 0, 1) }()
	<-entered
	closeBlob(t, b)
	if err := <-err; !errors.Is(err, os.ErrClosed) {
		t.Errorf("waiter: %v", err)
	}
	if err := b.Fill(t.Context(), 0, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Fill after Close: %v", err)
	}
	closeBlob(t, b) // idempotent
	if s.live != 0 {
		t.Errorf("%d blobs of the store are open", s.live)
	}
}

// Nothing that is present or on its way is fetched again to save a request.
func TestFetchedOnce(t *testing.T) {
	x := makeBlob(t, 77, lengths(77, 200))
	s := &store{stored: x.stored}
	b := open(t, newManager(t, quietOptions()), x.source(s))
	defer closeBlob(t, b)
	s.requests()
	for off := int64(0); off < b.Size(); off += 64 << 10 { // islands
		if err := b.Fill(t.Context(), off, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Fill(t.Context(), 0, b.Size()); err != nil {
		t.Fatal(err)
	}
	log, total := s.requests()
	if end := b.entry.DataEnd(); total != end {
		t.Errorf("%d bytes fetched in %d requests, the chunks have %d", total, len(log), end)
	}
}
