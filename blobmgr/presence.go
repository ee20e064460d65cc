package blobmgr

import (
	"fmt"
	"math/bits"
	"sync/atomic"
)

// A bitmap has a bit for each unit. Single operations are atomic.
type bitmap []atomic.Uint64

func newBitmap(n int) bitmap { return make(bitmap, (n+63)/64) }

func (m bitmap) has(i int) bool { return m[i/64].Load()&(1<<(i%64)) != 0 }
func (m bitmap) set(i int)      { m[i/64].Or(1 << (i % 64)) }
func (m bitmap) clear(i int)    { m[i/64].And(^uint64(1 << (i % 64))) }

// all reports whether every bit of [i, j) is set.
func (m bitmap) all(i, j int) bool { return m.next(i, j) == j }

// next returns the first unset bit of [i, j), or j.
func (m bitmap) next(i, j int) int {
	for i < j {
		unset := ^m[i/64].Load() >> (i % 64)
		if unset != 0 {
			return min(i+bits.TrailingZeros64(unset), j)
		}
		i += 64 - i%64
	}
	return j
}

// loadPresence learns from the cache file and the clean mark what is there: a unit
// is present when both say so, suspect when only the file does. A mark that claims
// more than the file holds, or that cannot be read, is taken away before anything can
// be written.
func (b *Blob) loadPresence() error {
	clean, ok := parseClean(b.m.dir.read(b.name+cleanSuffix, 1<<10+int64(b.table.Units())), b.metaSum, b.table.Units())
	err := b.cache.Data(b.size, func(off, end int64) {
		first, last := b.covered(off, end)
		for u := first; u < last; u++ {
			if clean.has(u) {
				b.present.set(u)
				b.stored.Add(b.table.Unit(u).Len)
			} else {
				b.suspect.set(u)
				if !b.m.dir.cold.Load() {
					b.cached.set(u)
				}
			}
		}
	})
	if err != nil {
		return fmt.Errorf("find data in cache file %s: %w", b.Path(), err)
	}
	b.count()
	for i := range clean {
		ok = ok && clean[i].Load() == b.present[i].Load()
		b.durably[i].Store(b.present[i].Load())
	}
	if !ok {
		return b.removeMark()
	}
	return nil
}

// count finds how much is needed and how many units of it are missing.
func (b *Blob) count() {
	b.needed, b.missing = 0, 0
	for u := range b.table.Units() {
		if b.table.Needed(u) {
			b.needed += b.table.Unit(u).Len
			if !b.present.has(u) {
				b.missing++
			}
		}
	}
}

// mark makes units visible that were written, or verified in place, while the
// digests had generation gen. When they changed since, the units stay absent and
// whoever waits for them starts again.
func (b *Blob) mark(units []int, gen uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if gen != b.gen.Load() {
		return
	}
	for _, u := range units {
		if b.present.has(u) {
			continue
		}
		b.present.set(u)
		b.suspect.clear(u)
		b.cached.clear(u)
		b.stored.Add(b.table.Unit(u).Len)
		b.missing-- // only needed units are ever filled
		b.dirty = true
	}
}

// doubt makes those of units suspect that are present. The caller holds b.digests and
// b.mu.
func (b *Blob) doubt(units []int) {
	for _, u := range units {
		if b.present.has(u) {
			b.present.clear(u)
			b.durably.clear(u)
			b.suspect.set(u)
			b.trust(u)
			b.stored.Add(-b.table.Unit(u).Len)
		}
	}
	b.count()
	b.dirty = true
	if b.complete && b.missing > 0 {
		b.complete = false
		b.done = make(chan struct{})
	}
}

// lost makes everything suspect that was not durable when the disk failed to make it
// so: the kernel reports that once, and then takes pages that it could not write for
// clean. So they are right until they are dropped, and have to be written again.
func (b *Blob) lost() {
	b.m.dir.cold.Store(false)
	b.digests.Lock()
	defer b.digests.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gen.Add(1) // what is written but not marked yet is written again
	var units []int
	for u := range b.table.Units() {
		if b.present.has(u) && !b.durably.has(u) {
			units = append(units, u)
			b.cached.set(u)
		}
	}
	b.doubt(units)
	b.nudgeLocked()
}

// settled notes that units are on the disk.
func (b *Blob) settled(units bitmap) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range units {
		b.durably[i].Store(units[i].Load() & b.present[i].Load())
	}
}
