package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// Data is evicted from a blob that is mounted in two steps, because a reader that was
// told "it is there" reads the cache file after that, and nothing tells when it has:
//
//  1. Doubt: the clean mark goes, durably, and the units are suspect from then on. Their
//     data stay where they are. No new reader is allowed to read them without Fill, which
//     finds them right and present again, at the price of a digest.
//  2. Punch, many ticks later: what is still in doubt, and whose region nobody asked for
//     meanwhile, is punched. When that is not enough, PunchRead takes from the other regions
//     what nobody asked for.
//
// What is suspect in a region in doubt has been so for as long as the region: what is read
// is present again, and what becomes suspect later renews the region's doubt or ends it.
//
// So whoever reads a hole was allowed to read it before it was in doubt. On its way from
// the answer to its copy of the bytes (fs/read_write.c vfs_iocb_iter_read, then
// mm/filemap.c filemap_read, 6.18) it is in the kernel and can be held up by
//
//   - the scheduler, on a machine with too much to do for as long as it likes. The caller
//     of Punch must have seen that nobody is on the way any more who could have been when
//     the region was put in doubt;
//   - a page allocation that reclaims, of which the same is true but for the second that it
//     may wait interruptibly (mm/vmscan.c throttle_direct_reclaim). That is what a grace of
//     ten seconds and more is for;
//   - the disk, for as long as a command to it may time out, minutes. Then its page is in
//     the page cache and not up to date: Punch looks for such and puts the region off;
//   - O_DIRECT: hole punching waits for those (inode_dio_wait);
//   - the cgroup-v1 freezer, which may stop it where it waits for the answer, for hours.
//     The caller of Punch must look that nothing was frozen during the grace. Freezing by
//     cgroup v2, SIGSTOP, ptrace and CPU quotas of 6.18 stop a task only on its way back
//     to user space.
//
// Ticks count only while this process runs (Manager.Tick): a suspended or starved machine
// has no grace that passed unseen.
//
// What EROFS has in its own page cache is right and stays right. Reads from there are not
// seen here, so what only they use counts as not read. That is as it should be: the disk
// is not needed for them.

const (
	// regionSize is what is evicted as a whole, in bytes of the cache file.
	regionSize = 1 << 20
	// proof is for how many ticks a backend that gave bytes is taken to have the blob, and
	// doubts for how many one that gave none is not asked again.
	proof, doubts = 60, 10
	// probeSize and probeTime bound the read that finds out.
	probeSize = 4 << 10
	probeTime = 10 * time.Second
)

// region returns where unit u is evicted: where it begins.
func (b *Blob) region(u int) int { return int(b.table.Unit(u).Off / regionSize) }

func regions(size int64) int { return int((size + regionSize - 1) / regionSize) }

// touch notes that [off, off+n) is read. Off is in the file.
func (b *Blob) touch(off, n int64) {
	if off >= b.size || n == 0 {
		return
	}
	now := b.m.clock.Load()
	for r := off / regionSize; r <= (min(off+n, b.size)-1)/regionSize; r++ {
		if b.heat[r].Load() != now { // a line that all processors share is written only then
			b.heat[r].Store(now)
		}
	}
}

// Tick advances the clock that eviction goes by. One goroutine calls it, about every
// second; it must not make up for calls that it missed.
func (m *Manager) Tick() (now uint32) { return m.clock.Add(1) }

// A Region is a part of a blob that is evicted as a whole.
type Region struct {
	Blob  *Blob
	Read  uint32 // the tick at which it was read last
	Bytes int64  // of disk that can be had
	index int
}

// Regions appends the regions of b that have data, none of which is in doubt.
func (b *Blob) Regions(out []Region) []Region {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.heat {
		r := Region{Blob: b, Read: b.heat[i].Load(), index: i}
		suspect := int64(0)
		for u := range b.unitsOf(i) {
			switch n := b.extent(u).n; {
			case b.present.has(u):
				r.Bytes += n
			case b.suspect.has(u):
				suspect += n
			}
		}
		if r.Bytes += suspect; r.Bytes > 0 && (suspect == 0 || b.doubted[i] == 0) {
			out = append(out, r)
		}
	}
	return out
}

// unitsOf yields the units that begin in region i.
func (b *Blob) unitsOf(i int) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		end := int64(i+1) * regionSize
		for u := b.within(int64(i) * regionSize); u < b.table.Units() && b.table.Unit(u).Off < end; u++ {
			if !yield(u) {
				return
			}
		}
	}
}

// An extent is a run of the cache file.
type extent struct{ off, n int64 }

// extent returns the pages that unit u has for itself: units begin where pages do.
func (b *Blob) extent(u int) extent {
	x := b.table.Unit(u)
	return extent{x.Off, (x.Len + 4095) &^ 4095}
}

// growth returns how much disk units take that do not have it. The caller holds mu.
func (b *Blob) growth(units []int) (n int64) {
	for _, u := range units {
		if !b.present.has(u) && !b.suspect.has(u) {
			n += b.extent(u).n
		}
	}
	return n
}

// enter makes the caller one of those whom closing b waits for. ctx ends when b does.
func (b *Blob) enter(ctx context.Context) (context.Context, func(), error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return nil, nil, os.ErrClosed
	case b.f == nil: // the kernel's
		return nil, nil, errors.ErrUnsupported
	}
	b.work.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(b.ctx, func() { cancel(os.ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
		b.work.Done()
	}, nil
}

// Doubt is the first step of evicting regions of b. Before it the kernel must ask again
// before it reads the cache file. Units that are being filled are left out.
//
// An error means that nothing has changed: b is closed, its mark cannot be removed, or no
// backend gives its bytes now, so that it would be a loss.
func (b *Blob) Doubt(ctx context.Context, rs []Region) error {
	ctx, leave, err := b.enter(ctx)
	if err != nil {
		return fmt.Errorf("evict from blob %s: %w", b.name, err)
	}
	defer leave()
	if err = b.probe(ctx); err == nil {
		err = b.durable.take(ctx)
	}
	if err != nil {
		return fmt.Errorf("evict from blob %s: %w", b.name, err)
	}
	defer b.durable.give()
	failpoint.Hit("blobmgr.evict.doubt")
	if err := b.removeMark(); err != nil {
		return fmt.Errorf("evict from blob %s: %w", b.name, err)
	}
	failpoint.Hit("blobmgr.evict.doubted")
	b.digests.RLock()
	defer b.digests.RUnlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range rs {
		b.doubted[r.index] = b.m.clock.Load()
		for u := range b.unitsOf(r.index) {
			b.distrust(u)
		}
	}
	b.dirty = true
	if b.complete && b.missing > 0 {
		b.complete = false
		b.done = make(chan struct{})
	}
	b.nudgeLocked()
	return nil
}

// distrust makes a present unit suspect. The caller holds digests and mu.
func (b *Blob) distrust(u int) {
	if !b.present.has(u) || b.filling[u] != nil {
		return
	}
	b.present.clear(u)
	b.durably.clear(u)
	b.suspect.set(u)
	b.stored.Add(-b.table.Unit(u).Len)
	if b.table.Needed(u) {
		b.missing++
	}
}

// probe is an error unless a backend has given bytes of b a short time ago, or does now.
func (b *Blob) probe(ctx context.Context) error {
	if at := b.proven.Load(); at != 0 && b.m.clock.Load()-at < proof {
		return nil
	}
	if at := b.unproven.Load(); at != 0 && b.m.clock.Load()-at < doubts {
		return errUnproven
	}
	ctx, cancel := context.WithTimeout(backend.WithPriority(ctx, backend.Prefetch), probeTime)
	defer cancel()
	b.mu.Lock()
	origins := b.origins
	b.mu.Unlock()
	x := b.table.Unit(0)
	p := make([]byte, min(x.CLen, probeSize))
	err := errUnproven
	for _, o := range origins {
		var src backend.Blob
		if src, err = o.open(ctx, b.entry.DataEnd()); err == nil {
			err = src.ReadAt(ctx, p, x.COff)
		}
		if err == nil {
			b.proven.Store(b.m.clock.Load())
			return nil
		}
	}
	b.unproven.Store(b.m.clock.Load())
	return fmt.Errorf("its data could not be fetched again: %w", err)
}

var errUnproven = errors.New("no backend has given it a moment ago")

// Doubtful returns how many bytes of disk are in doubt in b, and how many of them in
// regions that nobody has read since.
func (b *Blob) Doubtful() (all, unread int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, at := range b.doubted {
		if at == 0 {
			continue
		}
		n := int64(0)
		for u := range b.unitsOf(i) {
			if b.suspect.has(u) {
				n += b.extent(u).n
			}
		}
		all += n
		if b.heat[i].Load() <= at {
			unread += n
		}
	}
	return all, unread
}

// trust ends the doubt about the region of unit u, which becomes suspect for another
// reason, and later than the region. The caller holds mu.
func (b *Blob) trust(u int) { b.doubted[b.region(u)] = 0 }

// Trust ends all doubt: nothing of b need go. It is verified again when it is read, or
// by completion.
func (b *Blob) Trust() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.ContainsFunc(b.doubted, func(at uint32) bool { return at != 0 }) {
		return
	}
	clear(b.doubted)
	b.nudgeLocked()
	if b.completes() {
		b.begin()
	}
}
