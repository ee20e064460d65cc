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
// more than the file holds is taken away before anything can be written.
func (b *Blob) loadPresence() error {
	clean := parseClean(b.m.dir.read(b.name+cleanSuffix, 1<<10+int64(b.table.Units())), b.metaSum, b.table.Units())
	err := b.cache.Data(b.size, func(off, end int64) {
		for u := b.within(off); u < b.table.Units(); u++ {
			x := b.table.Unit(u)
			if x.Off+x.Len > end {
				break
			}
			if clean.has(u) {
				b.present.set(u)
				b.stored.Add(x.Len)
			} else {
				b.suspect.set(u)
			}
		}
	})
	if err != nil {
		return fmt.Errorf("find data in cache file %s: %w", b.Path(), err)
	}
	b.count()
	for i := range clean {
		if clean[i].Load() != b.present[i].Load() {
			return b.removeMark()
		}
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
		b.trust(u)
		b.stored.Add(b.table.Unit(u).Len)
		b.missing-- // only needed units are ever filled
		b.dirty = true
	}
}

// doubt makes the units of changed, whose chunks got digests that were not known
// before, suspect if they were present. The caller holds b.digests and b.mu.
func (b *Blob) doubt(changed []int) {
	for _, u := range changed {
		if b.present.has(u) {
			b.present.clear(u)
			b.suspect.set(u)
			b.trust(u)
			b.stored.Add(-b.table.Unit(u).Len)
		}
	}
	b.count()
}
