package blobmgr

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// evicting opens a complete blob of some regions, of which nothing is fetched unasked.
func evicting(t *testing.T, o Options) (*Manager, *Blob, *fixture, *store) {
	t.Helper()
	x := makeBlob(t, 70, lengths(70, 300))
	s := &store{stored: x.stored}
	m := newManager(t, o)
	b := open(t, m, x.source(s))
	t.Cleanup(func() { closeBlob(t, b) })
	fill(t, b, x, 0, b.Size())
	s.requests()
	if len(b.Regions(nil)) < 3 {
		t.Fatalf("want a blob of some regions, got %d", len(b.Regions(nil)))
	}
	return m, b, x, s
}

func doubt(t testing.TB, b *Blob) {
	t.Helper()
	if err := b.Doubt(t.Context(), b.Regions(nil)); err != nil {
		t.Fatal(err)
	}
}

// punch takes what has been in doubt for more than grace ticks.
func punch(t testing.TB, b *Blob, grace uint32) int64 {
	t.Helper()
	n, err := b.Punch(t.Context(), before(b, grace), b.Size())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func before(b *Blob, grace uint32) uint32 {
	now := b.m.clock.Load()
	return now - min(grace, now)
}

func doubtful(b *Blob) int64 {
	all, _ := b.Doubtful()
	return all
}

// disk returns how much disk b's cache file takes.
func disk(t testing.TB, b *Blob) int64 {
	t.Helper()
	st, err := b.File().Stat()
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// TestEvictWaitsForReaders: a reader that was told that its data are there finds them for
// the length of the grace. Without one it reads zeros, which shows that this test sees it.
func TestEvictWaitsForReaders(t *testing.T) {
	const grace = 5
	m, b, x, s := evicting(t, quietOptions())
	read := func() []byte {
		p := make([]byte, 64<<10)
		if _, err := b.File().ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if !b.Ready(0, 64<<10) {
		t.Fatal("not ready")
	}
	doubt(t, b)
	if b.Ready(0, 1) {
		t.Error("ready while it is in doubt")
	}
	for range grace {
		if n := punch(t, b, grace); n != 0 {
			t.Fatalf("punched %d bytes within the grace", n)
		}
		m.Tick()
	}
	if n := punch(t, b, grace); n != 0 || !bytes.Equal(read(), x.plain[:64<<10]) {
		t.Fatalf("punched %d bytes within the grace", n)
	}
	m.Tick()
	before := disk(t, b)
	n := punch(t, b, grace)
	if after := disk(t, b); n < before*9/10 || before-after < n*9/10 {
		t.Errorf("punched %d bytes of %d, %d are left", n, before, after)
	}
	if bytes.Equal(read(), x.plain[:64<<10]) {
		t.Error("nothing was punched")
	}
	fill(t, b, x, 0, b.Size())
	if log, _ := s.requests(); len(log) == 0 {
		t.Error("what was punched was not fetched again")
	}
	if got, _ := m.Evicted(); got != n {
		t.Errorf("%d bytes are counted of %d", got, n)
	}

	doubt(t, b)
	m.Tick()
	punch(t, b, 0)
	if bytes.Equal(read(), x.plain[:64<<10]) {
		t.Error("without a grace a reader should read zeros")
	}
}

// TestDoubtIsFree: what is read while it is in doubt is verified where it is and stays,
// with its region.
func TestDoubtIsFree(t *testing.T) {
	m, b, x, s := evicting(t, quietOptions())
	all := int64(0)
	for _, r := range b.Regions(nil) {
		all += r.Bytes
	}
	doubt(t, b)
	if got, unread := b.Doubtful(); got != all || unread != all {
		t.Errorf("%d bytes are in doubt, %d unread, want %d", got, unread, all)
	}
	m.Tick()
	fill(t, b, x, 0, 1)
	if left, unread := b.Doubtful(); left >= all || unread > all-(regionSize-256<<10) {
		t.Errorf("%d bytes are in doubt, %d unread, of %d: the region that was read still is", left, unread, all)
	}
	m.Tick()
	if n := punch(t, b, 1); n == 0 || n > all-(regionSize-256<<10) {
		t.Errorf("punched %d bytes of %d, want all but the first region", n, all)
	}
	check(t, b, x, 0, 1)
	if log, _ := s.requests(); len(log) > 0 {
		t.Errorf("asked the backend for %v", log)
	}
	fill(t, b, x, 0, b.Size())
	doubt(t, b)
	b.Trust()
	m.Tick()
	if n := punch(t, b, 0); n != 0 || doubtful(b) != 0 {
		t.Errorf("punched %d bytes that were trusted again", n)
	}
}

// A punchedFile is a cache file whose holes may fail, and reads of the disk be under way.
type punchedFile struct {
	cacheFile
	reading bool
	punch   func() error
}

func (f *punchedFile) Reading(off, n int64) (bool, error) {
	if f.reading {
		return true, nil
	}
	return f.cacheFile.Reading(off, n)
}

func (f *punchedFile) PunchHole(off, n int64) error {
	if err := f.punch(); err != nil {
		_ = f.cacheFile.PunchHole(off, n/2) // as an error in the middle does
		return err
	}
	return f.cacheFile.PunchHole(off, n)
}

// TestEvictOrder: the clean mark is gone before a hole is punched; a hole that fails, and
// a mark that cannot go, leave right bytes; a region that is being read waits.
func TestEvictOrder(t *testing.T) {
	f := &punchedFile{}
	o := quietOptions()
	o.wrap = func(c cacheFile) cacheFile {
		f.cacheFile = c
		return f
	}
	m, b, x, s := evicting(t, o)
	clean := b.name + cleanSuffix
	<-b.Done()
	if !m.dir.exists(clean) {
		t.Fatal("there is no mark")
	}
	punches, marked := 0, 0
	f.punch = func() error {
		punches++
		if m.dir.exists(clean) {
			marked++
		}
		if b.present.has(0) {
			t.Error("present while it is punched")
		}
		return syscall.EIO
	}
	doubt(t, b)
	m.Tick()
	f.reading = true
	if n := punch(t, b, 0); n != 0 || punches > 0 {
		t.Errorf("punched %d bytes that somebody reads", n)
	}
	f.reading = false
	if n := punch(t, b, 0); n != 0 || punches > 0 {
		t.Errorf("punched %d bytes without another grace", n)
	}
	m.Tick()
	if n, err := b.Punch(t.Context(), before(b, 0), b.Size()); n != 0 || !errors.Is(err, syscall.EIO) {
		t.Errorf("a hole that fails: %d, %v", n, err)
	}
	if punches != 1 || marked > 0 {
		t.Errorf("%d holes, %d of them while the mark vouched for the data", punches, marked)
	}
	fill(t, b, x, 0, b.Size())
	if log, _ := s.requests(); len(log) == 0 {
		t.Error("half a hole was not fetched again")
	}

	<-b.Done()
	if err := errors.Join(os.Remove(m.dir.path(clean)), os.MkdirAll(m.dir.path(clean+"/keep"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := b.Doubt(t.Context(), b.Regions(nil)); err == nil {
		t.Error("evicted though the mark is still there")
	}
	check(t, b, x, 0, b.Size())
	if err := os.RemoveAll(m.dir.path(clean)); err != nil {
		t.Fatal(err)
	}
}

// TestEvictWhatCanComeBack: nothing goes that no backend has.
func TestEvictWhatCanComeBack(t *testing.T) {
	x := makeBlob(t, 71, lengths(71, 50))
	s := unreachable(x)
	o := quietOptions()
	o.Dir = cleanCopy(t, x, false)
	m := newManager(t, o)
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	if err := b.Doubt(t.Context(), b.Regions(nil)); err == nil {
		t.Error("evicted what nobody else has")
	}
	if !b.Stats().Complete || doubtful(b) > 0 {
		t.Error("a blob that cannot be fetched again has changed")
	}
	check(t, b, x, 0, b.Size())
	asked := s.opens
	if err := b.Doubt(t.Context(), b.Regions(nil)); err == nil || s.opens != asked {
		t.Errorf("asked again at once: %v", err)
	}
	s.openErr = nil
	for range doubts {
		m.Tick()
	}
	doubt(t, b)
	if b.Stats().Complete {
		t.Error("complete, and in doubt")
	}
}

// TestEvictedStaysAway: completion does not bring back what was evicted until somebody
// misses something, and it does not go above its limit.
func TestEvictedStaysAway(t *testing.T) {
	o := Options{Readahead: -1, CompletionDelay: time.Millisecond}
	m, b, x, s := evicting(t, o)
	<-b.Done()
	doubt(t, b)
	m.Tick()
	if punch(t, b, 0) == 0 {
		t.Fatal("nothing went")
	}
	if missing, _ := b.missingNow(); missing {
		t.Error("completion would go on at once")
	}
	grown, _ := m.Growth()
	const limit = 3 << 20
	m.SetRoom(Room{Unasked: grown + limit, All: grown + limit})
	s.requests()
	done := b.Done()
	fill(t, b, x, 0, 1)
	for now, flying := m.Growth(); flying > 0 || now < grown+1<<20; now, flying = m.Growth() {
		if now+flying > grown+limit {
			t.Fatal("above its limit")
		}
		time.Sleep(time.Millisecond)
	}
	if n := disk(t, b); n > limit || b.Stats().Complete {
		t.Fatalf("completion took %d bytes, more than its limit", n)
	}
	m.SetRoom(Room{Unasked: 1 << 40, All: 1 << 40})
	for b.nudge(); ; b.nudge() { // or its pauses would take seconds
		select {
		case <-done:
		case <-time.After(10 * time.Millisecond):
			continue
		}
		break
	}
	check(t, b, x, 0, b.Size())
}

// TestRoom: a read above the limit waits until there is room or no hope of it, and one
// that finds the disk full is tried again when there is.
func TestRoom(t *testing.T) {
	x := makeBlob(t, 72, []int{8192, 8192})
	s := &store{stored: x.stored}
	var full atomic.Bool
	o := quietOptions()
	o.wrap = func(f cacheFile) cacheFile {
		return &hookedFile{cacheFile: f, write: func(int64, int) error {
			if full.Load() {
				return syscall.ENOSPC
			}
			return nil
		}}
	}
	m := newManager(t, o)
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	full.Store(true)
	if err := b.Fill(t.Context(), 0, 1); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a full disk without a limit: %v", err)
	}
	<-m.Short()
	m.SetRoom(Room{Unasked: 1 << 40, All: 1 << 40})
	filled := make(chan error)
	go func() { filled <- b.Fill(t.Context(), 0, 1) }()
	<-m.Short()
	full.Store(false)
	m.SetRoom(Room{Unasked: 1 << 40, All: 1 << 40})
	if err := <-filled; err != nil {
		t.Error(err)
	}

	m.SetRoom(Room{})
	go func() { filled <- b.Fill(t.Context(), 8192, 1) }()
	<-m.Short()
	if b.Ready(8192, 1) {
		t.Error("filled though there is no room")
	}
	m.SetRoom(Room{Hopeless: true})
	if err := <-filled; err != nil {
		t.Error(err)
	}
	check(t, b, x, 0, b.Size())
	if _, waits := m.Evicted(); waits != 1 {
		t.Errorf("%d reads waited for room, want 1", waits)
	}
}

// TestEvictModel evicts all the time, while readers read at random, leave, and compare
// what they were promised. The lock stands for the grace: no tick passes between a promise
// and its read.
func TestEvictModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m, b, x, _ := evicting(t, Options{CompletionDelay: time.Millisecond})
	enough := time.Now().Add(2 * time.Second)
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	var grace sync.RWMutex
	var wg sync.WaitGroup
	for i := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, i))
		wg.Go(func() {
			for ctx.Err() == nil {
				off := r.Int64N(b.Size())
				n := min(1+r.Int64N(300<<10), b.Size()-off)
				fctx, cancel := context.WithCancel(t.Context())
				if r.IntN(4) == 0 {
					time.AfterFunc(time.Duration(r.IntN(300))*time.Microsecond, cancel)
				}
				err := b.Fill(fctx, off, n)
				cancel()
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				grace.RLock()
				if b.Ready(off, n) {
					p := make([]byte, n)
					if _, err := b.File().ReadAt(p, off); err != nil || !bytes.Equal(p, x.plain[off:off+n]) {
						t.Errorf("seed %d: wrong bytes in %d+%d: %v", seed, off, n, err)
						stop()
					}
				}
				grace.RUnlock()
			}
		})
	}
	r := rand.New(rand.NewPCG(seed, 99))
	punched := int64(0)
	for ctx.Err() == nil && (punched == 0 || time.Now().Before(enough)) {
		grace.Lock()
		m.Tick()
		grace.Unlock()
		rs := b.Regions(nil)
		r.Shuffle(len(rs), func(i, j int) { rs[i], rs[j] = rs[j], rs[i] })
		if err := b.Doubt(t.Context(), rs[:r.IntN(len(rs)+1)]); err != nil {
			t.Fatal(err)
		}
		how := b.Punch
		if r.IntN(2) == 0 {
			how = b.PunchRead
		}
		n, err := how(t.Context(), before(b, 0), r.Int64N(b.Size()))
		if err != nil {
			t.Fatal(err)
		}
		punched += n
		if r.IntN(8) == 0 {
			b.Trust()
		}
	}
	stop()
	wg.Wait()
	if punched == 0 {
		t.Error("nothing was ever punched")
	}
	t.Logf("punched %d MiB of a blob of %d", punched>>20, b.Size()>>20)
}

// TestEvictClosed: a blob that is closed meanwhile says so.
func TestEvictClosed(t *testing.T) {
	x := makeBlob(t, 73, []int{8192})
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(&store{stored: x.stored}))
	fill(t, b, x, 0, 8192)
	rs := b.Regions(nil)
	closeBlob(t, b)
	if err := b.Doubt(t.Context(), rs); !errors.Is(err, fs.ErrClosed) {
		t.Error(err)
	}
	if _, err := b.Punch(t.Context(), 0, 1); !errors.Is(err, fs.ErrClosed) {
		t.Error(err)
	}
}

func BenchmarkReady(bm *testing.B) {
	for _, n := range []int64{4 << 10, 128 << 10} {
		bm.Run(fmt.Sprint(n), func(bm *testing.B) {
			x := makeBlob(bm, 74, lengths(74, 500))
			b := open(bm, newManager(bm, quietOptions()), x.source(&store{stored: x.stored}))
			defer closeBlob(bm, b)
			fill(bm, b, x, 0, b.Size())
			bm.ReportAllocs()
			off := int64(0)
			for bm.Loop() {
				if off += 4096; off+n > b.Size() {
					off = 0
				}
				if !b.Ready(off, n) {
					bm.Fatal("not ready")
				}
			}
		})
	}
}
