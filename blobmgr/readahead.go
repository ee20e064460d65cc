package blobmgr

import (
	"context"
	"sync"
	"sync/atomic"
)

const (
	// firstWindow is the first window of a stream, and what is fetched behind a miss
	// when nothing is known of the files; in stored bytes.
	firstWindow = 256 << 10
	// maxWindow is reached by doubling while a stream goes on.
	maxWindow = 4 << 20
	// streams is how many sequential readers of a blob are told apart.
	streams = 4
	// steady is how often a reader must go on where it was expected to until it counts
	// as a stream. Until then only what lies around its misses is fetched: most reads
	// of a starting program continue nothing, and the link is what they share.
	steady = 2
	// everythingAfter is how many stored bytes a stream must have run through to be
	// taken for a reader of everything.
	everythingAfter = 12 << 20
	// everythingPart of a blob that was missed (in stored bytes) means the same.
	everythingPart = 0.3
)

// A readahead watches where a blob is read and fetches what comes next. It is told
// about every miss, and about the first hit behind a stream's marker.
type readahead struct {
	b     *Blob
	first int64 // window of a new stream; negative: no readahead
	// markers holds for each stream the units [marker, end) of its window whose
	// reading calls for the next one, as marker<<32 | end; 0: none.
	markers [streams]atomic.Uint64
	kick    chan int     // streams whose marker was passed
	jobs    chan []units // to fetch

	mu        sync.Mutex // guards what follows
	streams   [streams]stream
	clock     uint64
	missedC   int64 // stored bytes of all misses
	near      *locality
	dirMisses map[int32]uint8
}

// units is a run [first, last).
type units struct{ first, last int }

// A stream is a reader that goes forward.
type stream struct {
	begin  int    // where its current window begins
	end    int    // behind the last unit that was asked for
	goneOn int    // misses that continued it
	window int64  // stored bytes; 0: not steady yet
	run    int64  // stored bytes from where it began to end
	used   uint64 // clock
}

func newReadahead(b *Blob) *readahead {
	return &readahead{b: b, first: b.m.opt.Readahead, kick: make(chan int, streams), jobs: make(chan []units, 2*streams)}
}

// widen makes the first window of streams at least n stored bytes.
func (r *readahead) widen(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n > 0 && r.first >= 0 {
		r.first = min(max(r.first, n), maxWindow)
	}
}

func (r *readahead) hint(l *locality) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.near, r.dirMisses = l, make(map[int32]uint8)
}

// passed notes that [first, last) was read and present. It is cheap: it looks at
// the markers only.
func (r *readahead) passed(first, last int) {
	for i := range r.markers {
		m := r.markers[i].Load()
		if m != 0 && last > int(m>>32) && first < int(m&0xffffffff) && r.markers[i].CompareAndSwap(m, 0) {
			select {
			case r.kick <- i:
			default: // never: each stream has one place in it
			}
		}
	}
}

// missed notes that [first, last) was read, and part of it neither present nor on its
// way.
func (r *readahead) missed(first, last int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first < 0 {
		return
	}
	r.missedC += r.bytes(first, last)
	if float64(r.missedC) > everythingPart*float64(r.b.entry.DataEnd()) {
		r.b.everything(last)
	}
	i, going := r.stream(first, last)
	s := &r.streams[i]
	r.clock++
	s.used = r.clock
	if going {
		s.goneOn++
	}
	if s.goneOn >= steady {
		r.extend(i)
		return
	}
	runs := join(r.around(first, last))
	s.begin = first
	for _, x := range runs {
		if x.first <= s.end && x.last > s.end {
			s.run += r.bytes(s.end, x.last)
			s.end = x.last
		}
	}
	r.fetch(runs)
}

// stream returns the stream that [first, last) goes on with, or a new one in place of
// the one that was not used for longest. The caller holds mu.
func (r *readahead) stream(first, last int) (i int, going bool) {
	oldest := 0
	for i := range r.streams {
		s := &r.streams[i]
		if s.used != 0 && s.begin <= first && first <= s.end {
			if last > s.end {
				s.run += r.bytes(s.end, last)
				s.end = last
			}
			return i, true
		}
		if s.used < r.streams[oldest].used {
			oldest = i
		}
	}
	r.markers[oldest].Store(0)
	r.streams[oldest] = stream{begin: first, end: last, run: r.bytes(first, last)}
	return oldest, false
}

// extend asks for the next window of stream i. The caller holds mu.
func (r *readahead) extend(i int) {
	s := &r.streams[i]
	s.window = min(max(2*s.window, r.first), maxWindow)
	next := r.forward(s.end, r.b.table.Units(), s.window)
	s.run += r.bytes(next.first, next.last)
	s.begin, s.end = next.first, next.last
	r.markers[i].Store(uint64((next.first+next.last)/2)<<32 | uint64(next.last))
	if s.run >= everythingAfter {
		r.b.everything(next.first)
	}
	r.fetch([]units{next})
}

// fetch has runs fetched.
func (r *readahead) fetch(runs []units) {
	select {
	case r.jobs <- runs:
	default: // too much to do already; the next miss asks again
	}
}

// bytes returns the stored bytes of [first, last).
func (r *readahead) bytes(first, last int) (n int64) {
	for u := first; u < last; u++ {
		n += r.b.table.Unit(u).CLen
	}
	return n
}

// serve fetches windows until ctx ends.
func (r *readahead) serve(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case i := <-r.kick:
			r.mu.Lock()
			r.extend(i)
			r.mu.Unlock()
		case runs := <-r.jobs:
			for _, j := range runs {
				for j.first < j.last && ctx.Err() == nil {
					_, j.first = r.b.dispatch(ctx, j.first, j.last, ahead)
				}
			}
		}
	}
}

// dispatch starts one background flight for the first absent units of [first, last)
// and returns where to go on. The flight is nil when there are none.
func (b *Blob) dispatch(ctx context.Context, first, last int, k kind) (*flight, int) {
	want := b.claimable(first, last)
	if len(want) == 0 {
		return nil, last
	}
	next := want[len(want)-1] + 1
	// Memory first: a demand read must not wait for a unit that waits for memory.
	g, err := b.m.memory.acquire(ctx, b.weight(want), k)
	if err != nil {
		return nil, last
	}
	b.digests.RLock()
	defer b.digests.RUnlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	still := want[:0]
	for _, u := range want {
		if b.free(u) {
			still = append(still, u)
		}
	}
	if len(still) == 0 || b.closed {
		g.release()
		return nil, next
	}
	// What others took meanwhile may lie between: it is not fetched twice.
	if n := b.group(still); n < len(still) {
		still = still[:n]
		next = still[n-1] + 1
	}
	if !b.m.room.try(b.growth(still), k) {
		g.release()
		return nil, last
	}
	return b.launch(still, k, g), next
}

// claimable returns the first absent units of [first, last) that one flight should
// take.
func (b *Blob) claimable(first, last int) (want []int) {
	b.digests.RLock()
	defer b.digests.RUnlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	start := int64(-1)
	for u := b.present.next(first, last); u < last; u = b.present.next(u+1, last) {
		if !b.free(u) || !b.table.Needed(u) {
			continue
		}
		x := b.table.Unit(u)
		if start < 0 {
			start = x.COff
		}
		if x.COff-start > maxRequest {
			break
		}
		want = append(want, u)
	}
	if len(want) > 0 {
		want = want[:b.group(want)]
	}
	return want
}

// free reports whether unit u is absent, in nobody's flight, and not about to be evicted:
// from that only a reader saves it. The caller holds mu.
func (b *Blob) free(u int) bool {
	return !b.present.has(u) && b.filling[u] == nil && !(b.suspect.has(u) && b.doubted[b.region(u)] != 0)
}

// begin starts the background goroutines with the first miss. The caller holds mu.
func (b *Blob) begin() {
	if b.started || b.closed {
		return
	}
	b.started = true
	ctx := b.ctx
	b.work.Go(func() { b.ahead.serve(ctx) })
	b.work.Go(func() { b.finish(ctx) })
}
