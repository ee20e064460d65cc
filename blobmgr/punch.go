package blobmgr

import (
	"context"
	"fmt"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// Punch is the second step: it gives back at least want bytes of what has been in doubt
// since before a tick, in regions that were not read since, if there is so much, and returns
// how many it gave back. While it runs the kernel must ask before it reads the cache file, as
// it has since Doubt, and no reader may be on its way that was allowed to read before that
// tick.
//
// An error leaves everything usable: what was to be punched is fetched again.
func (b *Blob) Punch(ctx context.Context, before uint32, want int64) (n int64, err error) {
	return b.punchWhere(ctx, before, want, false)
}

// PunchRead is Punch in regions that were read since: it gives back what was not read of
// them. Those that it leaves, because it has given back enough, get a second chance: their
// doubt ends.
func (b *Blob) PunchRead(ctx context.Context, before uint32, want int64) (n int64, err error) {
	return b.punchWhere(ctx, before, want, true)
}

func (b *Blob) punchWhere(ctx context.Context, before uint32, want int64, read bool) (n int64, err error) {
	_, leave, err := b.enter(ctx)
	if err != nil {
		return 0, fmt.Errorf("evict from blob %s: %w", b.name, err)
	}
	defer leave()
	for i := range b.heat {
		if n >= want && !read || ctx.Err() != nil {
			break
		}
		f := b.condemn(i, before, read, n < want)
		if f == nil {
			continue
		}
		got, err := b.punch(f)
		n += got
		if err != nil {
			return n, fmt.Errorf("evict from blob %s: punch a hole into %s: %w", b.name, b.Path(), err)
		}
	}
	return n, ctx.Err()
}

// condemn claims what can be punched of region i, nil if there is nothing, or it was read
// since and that is not asked for. One that was read is let go of unless it is wanted.
func (b *Blob) condemn(i int, before uint32, read, wanted bool) *flight {
	b.mu.Lock()
	defer b.mu.Unlock()
	at := b.doubted[i]
	switch {
	case at == 0 || at >= before:
		return nil
	case b.strays > 0: // one may be about to find a unit right that is gone then
		return nil
	case read != (b.heat[i].Load() > at):
		return nil
	case !wanted:
		b.doubted[i] = 0
		return nil
	}
	f := &flight{kind: eviction, cancel: func() {}, waiters: 1, done: make(chan struct{})}
	for u := range b.unitsOf(i) {
		if b.suspect.has(u) && b.filling[u] == nil {
			f.units = append(f.units, u)
			b.filling[u] = f
		}
	}
	if f.units == nil {
		b.doubted[i] = 0
		return nil
	}
	return f
}

// punch gives back the disk of f's units, unless somebody is reading them.
func (b *Blob) punch(f *flight) (n int64, err error) {
	runs := b.extents(f.units)
	for _, x := range runs {
		reading, err := b.cache.Reading(x.off, x.n)
		if err != nil || reading {
			b.spare(f)
			return 0, err
		}
	}
	b.mu.Lock()
	for _, u := range f.units {
		b.suspect.clear(u) // before: a punch that fails may have been half a one
		b.cached.clear(u)
	}
	b.rests = true
	b.mu.Unlock()
	failpoint.Hit("blobmgr.evict.punch")
	defer failpoint.Hit("blobmgr.evict.punched")
	defer b.spare(f)
	for _, x := range runs {
		if err := b.cache.PunchHole(x.off, x.n); err != nil {
			return n, err
		}
		n += x.n
		b.m.room.punched(x.n)
	}
	return n, nil
}

// spare ends f. Its region is in doubt anew if units of it are suspect.
func (b *Blob) spare(f *flight) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forget(f)
	f.landed = true
	close(f.done)
	i := b.region(f.units[0])
	b.doubted[i] = 0
	for u := range b.unitsOf(i) {
		if b.suspect.has(u) {
			b.doubted[i] = b.m.clock.Load()
		}
	}
}

// extents joins the extents of units that touch.
func (b *Blob) extents(units []int) (out []extent) {
	for _, u := range units {
		x := b.extent(u)
		if last := len(out) - 1; last >= 0 && out[last].off+out[last].n == x.off {
			out[last].n += x.n
			continue
		}
		out = append(out, x)
	}
	return out
}
