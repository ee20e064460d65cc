package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/internal/chunk"
)

// Why a flight was started.
type kind int

const (
	demand kind = iota
	ahead
	completion
	eviction // the opposite: it makes doubtful units absent
)

func (k kind) String() string {
	return [...]string{"demand", "readahead", "completion", "eviction"}[k]
}

// A flight makes some absent units present, with one read of the backend for all
// that need one. It is in Blob.filling for each of them until it ends, or until
// everybody who waited for it has left.
type flight struct {
	kind   kind
	units  []int // ascending
	grant  grant // for buf; background has it before the units are claimed
	buf    []byte
	cancel context.CancelFunc
	room   int64 // disk that it was given
	// waiters is guarded by Blob.mu. Flights that nobody asked for have one waiter
	// who never leaves.
	waiters int
	landed  bool // guarded by Blob.mu
	done    chan struct{}
	errs    map[int]error // of units that stay absent; read only after done
}

// launch claims units, which are absent and in nobody's flight, and starts to fill
// them. The caller holds mu.
func (b *Blob) launch(units []int, k kind, g grant) *flight {
	ctx, cancel := context.WithCancel(b.ctx)
	f := &flight{kind: k, units: units, grant: g, cancel: cancel, waiters: 1, done: make(chan struct{}), errs: make(map[int]error)}
	for _, u := range units {
		b.filling[u] = f
	}
	f.room = b.growth(units)
	if k == demand {
		b.m.quiet.enter()
		b.m.room.take(f.room)
	}
	b.work.Go(func() {
		defer cancel()
		b.run(ctx, f)
		b.land(f)
	})
	return f
}

// land ends f: what is not present by now failed.
func (b *Blob) land(f *flight) {
	if f.buf != nil {
		b.m.memory.recycle(f.buf)
		f.buf = nil
	}
	f.grant.release()
	if f.kind == demand {
		b.m.quiet.leave()
	}
	b.mu.Lock()
	b.forget(f)
	if f.landed = true; f.waiters == 0 {
		b.strays--
	}
	b.m.room.land(f.room, f.room-b.growth(f.units))
	finished := b.missing == 0 && !b.complete
	b.mu.Unlock()
	close(f.done)
	if finished {
		b.nudge()
	}
}

// forget makes the units of f claimable again. The caller holds mu.
func (b *Blob) forget(f *flight) {
	for _, u := range f.units {
		if b.filling[u] == f {
			delete(b.filling, u)
		}
	}
}

// leave takes one waiter from f. The last one cancels it.
func (b *Blob) leave(f *flight) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.waiters--; f.waiters == 0 {
		b.forget(f)
		f.cancel()
		if !f.landed {
			b.strays++
		}
	}
}

// wait waits for f and returns why a unit of [first, last) failed.
func (b *Blob) wait(ctx context.Context, f *flight, first, last int) error {
	select {
	case <-f.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, u := range f.units {
		if err := f.errs[u]; err != nil && first <= u && u < last && !b.present.has(u) {
			return err
		}
	}
	return nil
}

// run fills the units of f: from the cache file where it holds suspect data, then from
// the sibling, then from one source after the other until one gives the right bytes.
func (b *Blob) run(ctx context.Context, f *flight) {
	todo := f.units
	defer func() {
		if p := recover(); p != nil {
			b.m.log.Error("panic while filling", "blob", b.name, "err", p, "stack", string(debug.Stack()))
			f.fail(todo, fmt.Errorf("internal error: %v", p))
		}
	}()
	if err := b.reserve(ctx, f); err != nil {
		f.fail(todo, err)
		return
	}
	todo = b.recheck(ctx, todo)
	if f.kind == demand && len(todo) > 0 {
		b.m.room.wait(ctx)
	}
	todo = b.reuse(ctx, f, todo)
	if f.kind != demand {
		ctx = backend.WithPriority(ctx, backend.Prefetch)
	}
	b.mu.Lock()
	origins := b.origins
	b.mu.Unlock()
	for _, o := range origins {
		if len(todo) == 0 {
			return
		}
		todo = b.fetch(ctx, f, o, todo)
		if o.mirrored && f.corrupt(todo) { // what a mirror sent may be wrong, the origin itself not
			todo = b.fetch(backend.FromOrigin(ctx), f, o, todo)
		}
		if ctx.Err() != nil {
			f.fail(todo, context.Cause(ctx))
			return
		}
	}
	if f.corrupt(todo) {
		b.doubtTable()
	}
}

// corrupt reports whether some of units failed because their bytes were wrong.
func (f *flight) corrupt(units []int) bool {
	return slices.ContainsFunc(units, func(u int) bool { return errors.Is(f.errs[u], chunk.ErrCorrupt) })
}

func (f *flight) fail(units []int, err error) {
	for _, u := range units {
		f.errs[u] = err
	}
}

// reserve gets the buffer for what f reads.
func (b *Blob) reserve(ctx context.Context, f *flight) error {
	if f.grant.from == nil {
		g, err := b.m.memory.acquire(ctx, b.weight(f.units), f.kind)
		if err != nil {
			return context.Cause(ctx)
		}
		f.grant = g
	}
	off, end := b.stretch(f.units)
	f.buf = b.m.memory.buffer(end - off)
	return nil
}

// stretch returns the run of the stored object that holds units.
func (b *Blob) stretch(units []int) (off, end int64) {
	first, last := b.table.Unit(units[0]), b.table.Unit(units[len(units)-1])
	return first.COff, last.COff + last.CLen
}

// weight returns how much memory a flight for units needs: the stored bytes, and
// plain bytes of units that no worker's buffer can hold.
func (b *Blob) weight(units []int) int64 {
	off, end := b.stretch(units)
	n := b.m.memory.weight(end - off)
	large := int64(0)
	for _, u := range units {
		if l := b.table.Unit(u).Len; l > stepLen {
			large = max(large, l)
		}
	}
	return n + large
}
