package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// An AttachedFile is a cache file that belongs to the kernel: cachefiles' anonymous
// descriptor of an object that it has open. It can be written, not read.
type AttachedFile interface {
	// WriteAt gets whole pages in memory that begins where a page does.
	io.WriterAt
	// Data calls yield for each run of data, in order, up to size.
	Data(size int64, yield func(off, end int64)) error
}

// Attach gives b, which is of a Manager with Options.Attached, the cache file that the
// kernel has opened for it, and finds what is present in it: the file itself says so,
// because nothing unverified was ever written to it, and its writes go past the page
// cache in the order in which they were made. Another file that was attached before is
// detached; the same one is left as it is.
//
// The digests behind earlier data are in the chunk table that is kept; see
// [Options.Disown].
func (b *Blob) Attach(ctx context.Context, f AttachedFile) error {
	if err := b.attaching.take(ctx); err != nil {
		return fmt.Errorf("attach cache file of blob %s: %w", b.name, err)
	}
	defer b.attaching.give()
	if b.cache == (attachedFile{f}) {
		return nil
	}
	b.stop(os.ErrClosed)
	b.cache = nil
	present := newBitmap(b.table.Units())
	stored := int64(0)
	err := f.Data(b.size, func(off, end int64) {
		first, last := b.covered(off, end)
		for u := first; u < last; u++ {
			present.set(u)
			stored += b.table.Unit(u).Len
		}
	})
	if err != nil {
		return fmt.Errorf("find data in the cache file of blob %s: %w", b.name, err)
	}
	b.digests.RLock()
	defer b.digests.RUnlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.gone {
		return os.ErrClosed
	}
	for i := range present {
		b.present[i].Store(present[i].Load())
	}
	b.stored.Store(stored)
	b.count()
	b.cache = attachedFile{f}
	b.resume(ctx)
	switch {
	case b.missing == 0 && !b.complete:
		b.complete = true
		close(b.done)
	case b.missing > 0 && b.complete:
		b.complete = false
		b.done = make(chan struct{})
	}
	return nil
}

// Detach ends all work on f, which the kernel is about to close, when it is the file
// that b has. Waiters in Fill get os.ErrClosed. What is known to be present is
// remembered for Stats only.
func (b *Blob) Detach(f AttachedFile) {
	b.attaching <- struct{}{} // held for bounded times only
	defer b.attaching.give()
	if b.cache == (attachedFile{f}) {
		b.stop(os.ErrClosed)
		b.cache = nil
	}
}

// disownAttached has the kernel's file removed before the first chunk table of b is kept.
func (b *Blob) disownAttached(ctx context.Context) error {
	if !b.fresh || b.m.opt.Disown == nil {
		return nil
	}
	domain, id := unscoped(b.name)
	if err := b.m.opt.Disown(ctx, domain, id, b.size); err != nil {
		return fmt.Errorf("remove what the kernel's cache has under a lost chunk table: %w", err)
	}
	return nil
}

// errPartial marks that the kernel's file may lack, in the midst of data, what an image needs.
var errPartial = fmt.Errorf("%w, with other chunks of the same batches", errOther)

// partial reports whether ds are about chunks of batches of which the kernel's file may
// have others, and zeros for these: the kernel reads what has data without asking. The
// caller holds digests, or b is not open yet.
func (b *Blob) partial(ds []ChunkDigest) bool {
	return b.m.opt.Attached && slices.ContainsFunc(ds, func(d ChunkDigest) bool {
		return !b.table.Chunk(d.Index).Known && b.table.Needed(b.table.UnitOf(d.Index))
	})
}

// resume lets b work. The caller holds mu.
func (b *Blob) resume(ctx context.Context) {
	b.ctx, b.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	b.closed, b.started = false, false
	b.nudgeLocked()
	b.beginAll()
}

// stop ends all work on b and lets none begin.
func (b *Blob) stop(why error) {
	b.mu.Lock()
	b.closed = true
	cancel := b.cancel
	b.mu.Unlock()
	if cancel != nil {
		cancel(why)
	}
	b.work.Wait()
}

// within returns the first unit that begins at off or behind it.
func (b *Blob) within(off int64) int {
	u := b.table.UnitAt(off)
	if u < b.table.Units() && b.table.Unit(u).Off < off {
		u++
	}
	return u
}

// covered returns the units [first, last) that lie in [off, end) with all their bytes.
func (b *Blob) covered(off, end int64) (first, last int) {
	first = b.within(off)
	for last = first; last < b.table.Units(); last++ {
		if x := b.table.Unit(last); x.Off+x.Len > end {
			break
		}
	}
	return first, last
}

// An attachedFile is the cacheFile over an AttachedFile. It is durable in the order of
// its writes, and never suspect.
type attachedFile struct{ AttachedFile }

func (attachedFile) Datasync() error { return nil }

func (attachedFile) PunchHole(int64, int64) error { return errors.ErrUnsupported }

func (attachedFile) Reading(int64, int64) (bool, error) { return true, errors.ErrUnsupported }

func (attachedFile) ReadAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
