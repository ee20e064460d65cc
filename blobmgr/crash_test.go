package blobmgr

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	histories = flag.Int("histories", 10000, "how many histories TestModelOfCrashes runs")
	firstSeed = flag.Uint64("seed", 0, "the first of them; 0: $SEED, else another each time")
)

// hang is how long nothing may take, on the slowest machine.
const hang = 2 * time.Minute

// TestModelOfCrashes runs random histories of a cache: readers, completion, images that
// come and go, a process that is killed, power cuts, a disk that fails or is full, and
// damage by somebody else between two runs. Whatever is said to be there must read as it
// should, and in the end everything must work again.
//
//	go test ./blobmgr -run TestModelOfCrashes -seed 123 -histories 1
func TestModelOfCrashes(t *testing.T) {
	seed := *firstSeed
	if s := os.Getenv("SEED"); seed == 0 && s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("SEED: %v", err)
		}
	}
	seed = cmp.Or(seed, uint64(time.Now().UnixNano()))
	t.Logf("%d histories from seed %d", *histories, seed)
	blobs := make([]*fixture, 8)
	for i := range blobs {
		r := rand.New(rand.NewPCG(uint64(i), 6))
		lens := make([]int, 3+r.IntN(14))
		for j := range lens {
			lens[j] = 1 + r.IntN(9000)
		}
		blobs[i] = makeBlob(t, uint64(i), lens)
	}
	var next atomic.Int64
	var found tally
	var wg sync.WaitGroup
	for range max(2, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(*histories) || t.Failed() {
					return
				}
				h := newHistory(t, seed+uint64(i), blobs, &found)
				h.run()
			}
		})
	}
	wg.Wait()
	t.Logf("%+v", &found)
	if *histories >= 500 && !t.Failed() && !found.everything() {
		t.Errorf("the histories do not have everything in them: %+v", &found)
	}
}

// A tally counts what histories had in them.
type tally struct {
	cuts, kills, ends, flips, rots, faults, lies, completed, refused atomic.Int64
}

func (f *tally) everything() bool {
	for _, n := range []*atomic.Int64{&f.cuts, &f.kills, &f.ends, &f.flips, &f.rots, &f.faults, &f.lies, &f.completed, &f.refused} {
		if n.Load() == 0 {
			return false
		}
	}
	return true
}

func (f *tally) String() string {
	return fmt.Sprintf("cuts %d, kills %d, orderly ends %d, flips %d, of vouched bytes %d, faults of disk %d, lying stores %d, completed %d, refused fills %d",
		f.cuts.Load(), f.kills.Load(), f.ends.Load(), f.flips.Load(), f.rots.Load(), f.faults.Load(), f.lies.Load(), f.completed.Load(), f.refused.Load())
}

// A history is a cache with one blob over some runs.
type history struct {
	t     *testing.T
	seed  uint64
	r     *rand.Rand
	x     *fixture
	disk  *powerDisk
	boot  int // of the machine
	found *tally

	trace []string // what happened since the last error

	m      *Manager
	blobs  []*Blob // open
	store  *store
	well   bool // nothing fails in this session
	misled bool // the store has lied, also about the chunk table perhaps
	partly bool // images may have some of the chunks
}

func newHistory(t *testing.T, seed uint64, blobs []*fixture, found *tally) *history {
	r := rand.New(rand.NewPCG(seed, 7))
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "erofsd-history-")
	if err != nil {
		t.Fatal(err)
	}
	h := &history{t: t, seed: seed, r: r, x: blobs[r.IntN(len(blobs))], found: found}
	h.partly = r.IntN(4) > 0
	h.disk = newPowerDisk(t, dir, rand.New(rand.NewPCG(seed, 8)))
	return h
}

func (h *history) errorf(format string, args ...any) {
	h.t.Helper()
	h.t.Errorf("seed %d: %s, after %s", h.seed, fmt.Sprintf(format, args...), h.trace)
	h.trace = nil
}

// did notes what happened.
func (h *history) did(format string, args ...any) {
	h.trace = append(h.trace, fmt.Sprintf(format, args...))
}

func (h *history) run() {
	defer os.RemoveAll(h.disk.dir)
	for range 1 + h.r.IntN(4) {
		h.session()
	}
	h.recover()
}

// start opens the cache; nil when it cannot be opened with this disk.
func (h *history) start() *Manager {
	m, err := New(Options{
		Dir: h.disk.dir, MemoryLimit: minMemory, NoCompletion: h.r.IntN(2) == 0, CompletionDelay: time.Microsecond, Readahead: -1,
		wrap: h.disk.file, boot: fmt.Sprint("boot ", h.boot),
		wrapDir: func(sys fileSystem) fileSystem { return powerNames{sys, h.disk} },
	})
	if err != nil && h.well {
		h.errorf("open the cache: %v", err)
	}
	return m
}

// session is one run of a process that has the cache.
func (h *history) session() {
	r, d := h.r, h.disk
	d.mu.Lock()
	d.budget, d.faulty = -1, 0
	if r.IntN(2) == 0 {
		d.budget = r.IntN(60)
	}
	if r.IntN(3) == 0 {
		d.faulty = 2 + r.IntN(20)
		h.found.faults.Add(1)
	}
	h.well = d.budget < 0 && d.faulty == 0 && !h.misled
	d.mu.Unlock()
	h.store = &store{stored: h.x.stored}
	if r.IntN(6) == 0 {
		h.well, h.misled = false, true
		h.found.lies.Add(1)
		h.lie(rand.New(rand.NewPCG(r.Uint64(), 9)))
	}
	h.did("session: power for %d calls, faults %d", d.budget, d.faulty)
	if h.m = h.start(); h.m != nil {
		for range 1 + r.IntN(8) {
			h.step()
		}
	}
	h.end()
}

// lie makes the store fail and send wrong bytes.
func (h *history) lie(r *rand.Rand) {
	var mu sync.Mutex
	h.store.setFault(func(_ context.Context, p []byte, _ int64) error {
		mu.Lock()
		defer mu.Unlock()
		switch r.IntN(4) {
		case 0:
			return errors.New("the network is down")
		case 1:
			p[r.IntN(len(p))] ^= 1 << r.IntN(8)
		}
		return nil
	})
}

func (h *history) step() {
	r := h.r
	if len(h.blobs) == 0 {
		h.open()
		return
	}
	b := h.blobs[r.IntN(len(h.blobs))]
	switch r.IntN(11) {
	case 10:
		h.scrub()
	case 0:
		h.open()
	case 1:
		h.close(r.IntN(len(h.blobs)))
	case 2:
		h.did("drop pages")
		h.drop()
		h.check(b)
	case 3:
		h.complete(b)
	case 4:
		h.forget(b)
	default:
		h.read(b)
	}
}

// drop has the kernel drop pages that it could not write back. Between the failure of an
// fdatasync and its return nobody can know of it, so not in the middle of one.
func (h *history) drop() {
	turns := map[*Blob]bool{}
	for _, b := range h.blobs {
		if !turns[b] {
			turns[b] = true
			b.durable <- struct{}{}
			defer b.durable.give()
		}
	}
	h.disk.drop()
}

// open opens the blob for an image that uses some of its chunks, or all.
func (h *history) open() {
	src := h.x.source(h.store)
	if h.partly && h.r.IntN(2) == 0 {
		src.Digests = slices.DeleteFunc(slices.Clone(src.Digests), func(d ChunkDigest) bool { return h.r.IntN(3) == 0 })
	}
	if h.r.IntN(4) == 0 {
		src.Prefetch.Mode = All
	}
	ctx, cancel := context.WithTimeout(h.t.Context(), hang)
	defer cancel()
	b, err := h.m.Open(ctx, src)
	h.did("open with %d chunks of %d: %v", len(src.Digests), len(h.x.digests), err)
	if err == nil {
		h.blobs = append(h.blobs, b)
		h.check(b)
	} else if h.well || ctx.Err() != nil {
		h.errorf("open: %v", err)
	}
}

func (h *history) close(i int) {
	b := h.blobs[i]
	h.blobs = slices.Delete(h.blobs, i, i+1)
	err := b.Close()
	h.did("close: %v", err)
	if err != nil && h.well {
		h.errorf("close: %v", err)
	}
}

func (h *history) forget(b *Blob) {
	id := b.ID()
	for len(h.blobs) > 0 && h.r.IntN(4) > 0 {
		h.close(0)
	}
	err := h.m.Forget(h.t.Context(), "", id)
	h.did("forget: %v", err)
	if (len(h.blobs) > 0) != errors.Is(err, ErrOpen) || err != nil && len(h.blobs) == 0 && h.well {
		h.errorf("forget with %d open: %v", len(h.blobs), err)
	}
}

// scrub has everything verified; on a disk that is well nothing is wrong.
func (h *history) scrub() {
	ctx, cancel := context.WithTimeout(h.t.Context(), hang)
	defer cancel()
	r, err := h.m.Scrub(ctx, ScrubOptions{Rate: 1 << 40})
	h.did("scrub: %+v, %v", r, err)
	if ctx.Err() != nil || h.well && (err != nil || r.Wrong > 0) {
		h.errorf("scrub: %+v, %v", r, err)
	}
}

// complete waits for the rest of b, if it comes.
func (h *history) complete(b *Blob) {
	if !h.well {
		return
	}
	b.wish(Prefetch{Mode: All})
	select {
	case <-b.Done():
		h.found.completed.Add(1)
	case <-time.After(hang):
		h.errorf("never complete: %+v", b.Stats())
	}
	h.check(b)
}

// read has some readers fill ranges.
func (h *history) read(b *Blob) {
	var wg sync.WaitGroup
	for range 1 + h.r.IntN(3) {
		off, n := h.r.Int64N(b.Size()), 1+h.r.Int64N(b.Size())
		leaves := h.r.IntN(8) == 0
		wg.Go(func() { h.fill(b, off, n, leaves) })
	}
	wg.Wait()
	h.did("read")
}

func (h *history) fill(b *Blob, off, n int64, leaves bool) {
	ctx, cancel := context.WithTimeout(h.t.Context(), hang)
	defer cancel()
	if leaves {
		go cancel()
	}
	switch err := b.Fill(ctx, off, n); {
	case errors.Is(err, context.DeadlineExceeded):
		h.errorf("fill %d+%d hangs", off, n)
	case err == nil:
		if b.Ready(off, n) {
			h.same(b, off, n)
		}
	case h.well && !leaves && !strings.Contains(err.Error(), "no image has a digest"):
		h.errorf("fill %d+%d: %v", off, n, err)
	default:
		h.found.refused.Add(1)
	}
}

// same compares a range of the cache file with what it should be.
func (h *history) same(b *Blob, off, n int64) {
	p := make([]byte, min(n, b.Size()-off))
	if _, err := b.File().ReadAt(p, off); err != nil {
		h.errorf("read: %v", err)
	}
	b.digests.RLock()
	defer b.digests.RUnlock()
	for u := range b.table.Units() {
		x := b.table.Unit(u)
		from, to := max(x.Off, off), min(x.Off+x.Len, off+int64(len(p)))
		if from < to && b.table.Needed(u) && !bytes.Equal(p[from-off:to-off], h.x.plain[from:to]) {
			h.errorf("wrong bytes in unit %d of %d", u, b.table.Units())
		}
	}
}

// check compares everything that is said to be there.
func (h *history) check(b *Blob) {
	for u := range b.table.Units() {
		if x := b.table.Unit(u); b.Ready(x.Off, x.Len) {
			h.same(b, x.Off, x.Len)
		}
	}
}
