package blobmgr

import (
	"context"
	"math/bits"
	"runtime"
	"sync"
	"unsafe"

	"github.com/erofsd/erofsd/internal/chunk"
	"golang.org/x/sync/semaphore"
)

const (
	defaultMemory = 24 << 20
	minMemory     = 4 << 20

	// stepLen is how many plain bytes are decoded and written at once, the size of
	// a worker's buffer. nydus images have chunks of up to 1 MiB as a rule.
	stepLen = 1 << 20
	// minBuffer is the smallest buffer of the pool.
	minBuffer  = 32 << 10
	maxWorkers = 8
	pageSize   = 4096
)

// A memory hands out the buffers for stored bytes and the workers that decode
// them. What it holds, handed out or kept for later, stays within its limit,
// except that one buffer larger than the limit is possible at a time.
type memory struct {
	demand, background *semaphore.Weighted
	demandSize         int64
	backgroundSize     int64
	workers            chan *worker

	mu   sync.Mutex  // guards what follows
	free [6][][]byte // by size: minBuffer << i
	kept int64       // bytes in free
}

// A worker decodes. It belongs to one flight at a time.
type worker struct {
	decoder *chunk.Decoder
	buf     []byte
}

func newMemory(limit int64) *memory {
	if limit == 0 {
		limit = defaultMemory
	}
	n := min(runtime.GOMAXPROCS(0), maxWorkers, int(limit/4/stepLen))
	m := &memory{workers: make(chan *worker, max(n, 1))}
	for range cap(m.workers) {
		m.workers <- &worker{}
	}
	limit -= int64(cap(m.workers)) * stepLen
	m.demandSize = limit / 3
	m.backgroundSize = limit - m.demandSize
	m.demand = semaphore.NewWeighted(m.demandSize)
	m.background = semaphore.NewWeighted(m.backgroundSize)
	return m
}

// A grant is the right to n bytes of memory.
type grant struct {
	from *semaphore.Weighted
	n    int64
}

func (g grant) release() {
	if g.from != nil {
		g.from.Release(g.n)
	}
}

// acquire waits for n bytes. Demand takes what background leaves and has a reserve
// beside it.
func (m *memory) acquire(ctx context.Context, n int64, k kind) (grant, error) {
	shared := grant{m.background, min(n, m.backgroundSize)}
	if k != demand {
		return shared, m.background.Acquire(ctx, shared.n)
	}
	if m.background.TryAcquire(shared.n) {
		return shared, nil
	}
	reserve := grant{m.demand, min(n, m.demandSize)}
	return reserve, m.demand.Acquire(ctx, reserve.n)
}

// class returns which free list has buffers of n bytes; len(m.free) when they are
// not kept.
func (m *memory) class(n int64) int {
	return min(bits.Len64(uint64(max(n-1, 0))/minBuffer), len(m.free))
}

// weight is how much memory a buffer of n bytes takes.
func (m *memory) weight(n int64) int64 {
	if c := m.class(n); c < len(m.free) {
		return minBuffer << c
	}
	return n
}

// buffer returns n bytes of undefined content. The caller holds a grant of
// weight(n) and gives both back.
func (m *memory) buffer(n int64) []byte {
	c := m.class(n)
	if c == len(m.free) {
		return make([]byte, n)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := len(m.free[c]); l > 0 {
		p := m.free[c][l-1]
		m.free[c] = m.free[c][:l-1]
		m.kept -= int64(cap(p))
		return p[:n]
	}
	return make([]byte, n, minBuffer<<c)
}

// maxKept bounds what lies unused in the pool. It is small beside the limit:
// the largest buffers are what a stream of reads needs again and again.
const maxKept = 6 << 20

func (m *memory) recycle(p []byte) {
	c := m.class(int64(cap(p)))
	m.mu.Lock()
	defer m.mu.Unlock()
	if c < len(m.free) && m.kept+int64(cap(p)) <= maxKept {
		m.free[c] = append(m.free[c], p)
		m.kept += int64(cap(p))
	}
}

// worker waits for a worker whose buffer has n bytes.
func (m *memory) worker(ctx context.Context, n int64) (*worker, error) {
	select {
	case w := <-m.workers:
		if w.decoder == nil {
			w.decoder = chunk.NewDecoder()
		}
		if int64(len(w.buf)) < n {
			w.buf = pages(max(n, stepLen))
		}
		return w, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// pages returns n bytes that begin where a page does: writes that go past the page
// cache take nothing else (cachefiles' anonymous fd).
func pages(n int64) []byte {
	p := make([]byte, n+pageSize)
	skip := -uintptr(unsafe.Pointer(&p[0])) % pageSize
	return p[skip:][:n:n]
}

func (m *memory) done(w *worker) {
	if len(w.buf) > stepLen {
		w.buf = nil
	}
	m.workers <- w
}

// Close frees the decoders. Nobody has a worker.
func (m *memory) Close() {
	for range cap(m.workers) {
		if w := <-m.workers; w.decoder != nil {
			w.decoder.Close()
		}
	}
}

// A turn is a lock that may be held over I/O, so it is waited for with a context.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t turn) give() { <-t }
