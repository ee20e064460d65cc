package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// A Blob is an open cache file and what makes it fill. It is safe for concurrent
// use. All images with the same blob share one.
type Blob struct {
	m     *Manager
	name  string // of the cache file
	entry chunk.Entry
	size  int64
	f     *os.File // nil with Options.Attached
	fresh bool     // there was no NAME.meta
	// sibling is what the other transport has kept, nil if nothing.
	sibling *sibling
	// attaching serialises what changes cache, which is f or what is attached.
	attaching turn
	cache     cacheFile
	work      sync.WaitGroup // goroutines; added to under mu while not closed

	present  bitmap
	stored   atomic.Int64 // bytes present
	fetched  atomic.Int64
	requests atomic.Int64
	reused   atomic.Int64 // bytes from the sibling
	corrupt  atomic.Int64
	ahead    *readahead
	heat     []atomic.Uint32 // when each region was read last, see evict.go
	proven   atomic.Uint32   // when a backend was last seen to have the blob; 0: it is not known, or failed since
	unproven atomic.Uint32   // when none was, though asked; 0: never

	// Completion:
	hurry    atomic.Bool  // a reader wants everything
	cursor   atomic.Int64 // unit where to look for absent ones first
	troubled atomic.Bool  // the last request failed

	digests sync.RWMutex // guards the digests in table
	table   *chunk.Table
	gen     atomic.Uint64 // changes with them; written under digests and mu

	durable turn // guards what follows and the files NAME.meta and NAME.clean
	metaSum [32]byte
	unsaved bool // NAME.meta lacks digests of table

	mu sync.Mutex // guards what follows
	// ctx is the base of every fetch: a fetch outlives the waiter that began it.
	ctx      context.Context
	cancel   context.CancelCauseFunc
	suspect  bitmap // in the cache file, but not verified
	cached   bitmap // of these, perhaps not on the disk though they can be read
	durably  bitmap // present units that are on the disk
	filling  map[int]*flight
	needed   int64 // bytes that the images can read
	missing  int   // units of them that are not present
	started  bool  // background goroutines run
	dirty    bool  // the clean mark lists less than what is present
	complete bool
	done     chan struct{} // closed when complete
	changed  chan struct{} // closed, and made again, by nudge
	closed   bool          // nothing can be filled now
	gone     bool          // nor ever again
	origins  []*origin     // newest first
	prefetch Prefetch      // what counts of the images' wishes
	doubted  []uint32      // when each region came in doubt, see evict.go; 0: it did not
	rests    bool          // something was evicted, and nothing was missed since
	strays   int           // flights that go on though everybody has left them
	unasked  unasked       // what that has brought

	images int // Opens not yet given back; guarded by the name's turn
}

// newBlob opens the cache file called file for s. The caller has the name's turn.
func (m *Manager) newBlob(ctx context.Context, file string, s Source) (*Blob, error) {
	b := &Blob{
		m: m, name: file, entry: plainEntry(s.Entry), durable: newTurn(), attaching: newTurn(), images: 1,
		prefetch: s.Prefetch, closed: true, filling: make(map[int]*flight), done: make(chan struct{}), changed: make(chan struct{}),
		origins: []*origin{newOrigin(s)},
	}
	isNew, err := b.loadTable(ctx, s)
	if err != nil {
		return nil, err
	}
	changed, err := compare(b.table, s.Digests)
	if conflict := (*chunk.ConflictError)(nil); errors.As(err, &conflict) && !isNew {
		return nil, fmt.Errorf("%w: %w", errOther, err)
	}
	if err != nil {
		return nil, fmt.Errorf("image and blob do not belong together: %w", err)
	}
	if !isNew && b.partial(s.Digests) {
		return nil, errPartial
	}
	units, err := learn(b.table, s.Digests)
	if err != nil {
		return nil, err
	}
	b.fresh = isNew
	if err := b.openFiles(ctx, isNew || changed > 0, units); err != nil {
		return nil, err
	}
	b.ahead.widen(s.Prefetch.Window)
	return b, nil
}

// openFiles opens the cache file and finds what is present in it, unless the kernel
// will bring it. Units are those of which digests are new.
func (b *Blob) openFiles(ctx context.Context, writeMeta bool, units []int) error {
	b.size = b.table.Size()
	n := b.table.Units()
	b.present, b.suspect, b.cached, b.durably = newBitmap(n), newBitmap(n), newBitmap(n), newBitmap(n)
	b.heat, b.doubted = make([]atomic.Uint32, regions(b.size)), make([]uint32, regions(b.size))
	b.ahead = newReadahead(b)
	if b.m.opt.Attached {
		b.count()
	} else if err := b.openCache(); err != nil {
		return err
	}
	b.openSibling()
	var err error
	if writeMeta && b.m.opt.Attached {
		err = b.disownAttached(ctx)
	} else if writeMeta {
		err = b.disown(units, b.fresh)
	}
	if err == nil && writeMeta {
		err = b.writeMeta()
	}
	if err == nil && b.f != nil {
		err = b.loadPresence()
	}
	if err != nil {
		b.sibling.close()
		return errors.Join(err, b.closeFile())
	}
	if b.f != nil {
		b.mu.Lock()
		if b.complete = b.missing == 0; b.complete {
			close(b.done) // before anything else runs that may find it complete
		}
		b.resume(ctx)
		b.mu.Unlock()
	}
	b.m.metrics.open.Inc()
	return nil
}

func (b *Blob) openCache() error {
	f, err := b.inherit()
	if err == nil && f == nil {
		f, err = b.m.dir.openCache(b.name, b.size)
	}
	if err != nil {
		return fmt.Errorf("open cache file: %w", err)
	}
	b.f, b.cache = f, sparseFile{f}
	if b.m.opt.wrap != nil {
		b.cache = b.m.opt.wrap(b.cache)
	}
	return nil
}

// inherit returns the descriptor of the cache file that an earlier process left, nil if
// there is none.
func (b *Blob) inherit() (*os.File, error) {
	if b.m.opt.Inherited == nil {
		return nil, nil
	}
	f := b.m.opt.Inherited(b.name)
	if f == nil || b.m.dir.is(b.name, f, b.size) {
		return f, nil
	}
	b.m.log.Warn("the cache file was replaced since it was opened", "blob", b.name)
	return nil, f.Close()
}

func (b *Blob) closeFile() error {
	if b.f == nil {
		return nil
	}
	return b.f.Close()
}

// writeMeta writes NAME.meta after taking away a clean mark that was for another.
// It need not be durable before the next clean mark, a torn one is noticed; but with
// the kernel's own file there are no marks, and the file must not have data whose
// digests are lost.
func (b *Blob) writeMeta() error {
	if err := b.removeMark(); err != nil {
		return err
	}
	p := marshalMeta(b.entry, b.table)
	b.metaSum = metaSum(p)
	return b.m.dir.write(b.name+metaSuffix, p, b.m.opt.Attached)
}

// removeMark durably removes the clean mark if there is one.
func (b *Blob) removeMark() error {
	b.mu.Lock()
	b.dirty = true
	b.mu.Unlock()
	return b.m.dir.removeDurably(b.name + cleanSuffix)
}

// share adds the image of s to an open blob. The caller has the name's turn.
func (b *Blob) share(ctx context.Context, s Source) error {
	if plainEntry(s.Entry) != b.entry {
		return errOther
	}
	b.digests.RLock()
	changed, err := compare(b.table, s.Digests)
	partial := err == nil && b.partial(s.Digests)
	b.digests.RUnlock()
	if partial {
		return errPartial
	}
	if conflict := (*chunk.ConflictError)(nil); errors.As(err, &conflict) {
		return fmt.Errorf("%w: %w", errOther, err)
	}
	if err != nil {
		return err
	}
	if changed > 0 || b.unsaved {
		if err := b.extend(ctx, s.Digests); err != nil {
			return err
		}
	}
	b.addOrigin(s)
	b.wish(s.Prefetch)
	b.images++
	return nil
}

// addOrigin makes s the first place to read from. One too many is closed.
func (b *Blob) addOrigin(s Source) {
	if last := b.putOrigin(s); last != nil {
		last.close()
	}
}

// putOrigin is addOrigin that returns what is to be closed. While b works an open may be
// under way in it, which is waited for beside.
func (b *Blob) putOrigin(s Source) (last *origin) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, o := range b.origins {
		if o.same(s) {
			b.origins = append([]*origin{o}, slices.Delete(slices.Clone(b.origins), i, i+1)...)
			return nil
		}
	}
	if len(b.origins) == maxOrigins {
		last = b.origins[maxOrigins-1]
		b.origins = b.origins[:maxOrigins-1]
	}
	b.origins = append([]*origin{newOrigin(s)}, b.origins...)
	if last != nil && !b.closed {
		b.work.Go(func() { last.close() })
		return nil
	}
	return last
}

// File returns the cache file; nil with Options.Attached. It was opened for reading
// and writing before any mark could be put on it, so that b's own writes raise no
// events. Only b writes to it, and it is closed with b.
func (b *Blob) File() *os.File { return b.f }

// Path returns the name of the cache file; with Options.Attached only the kernel knows
// one.
func (b *Blob) Path() string { return b.m.dir.path(b.name) }

// ID returns the blob's id, or that of the variant that b is. Within a domain no two
// blobs have the same.
func (b *Blob) ID() string {
	_, id := unscoped(b.name)
	return id
}

// Size returns the size of the cache file in bytes.
func (b *Blob) Size() int64 { return b.size }

// Done returns a channel that is closed when everything the images can read is
// present and durable. A later Open that brings digests of further chunks makes
// Done return a new channel; ask again after each Open.
func (b *Blob) Done() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.done
}

// Close gives back one Open. The last one ends all work on b, makes what is present
// durable and closes the file; then waiters in Fill get os.ErrClosed.
func (b *Blob) Close() error { return b.m.release(b) }

// close ends b. The caller has the name's turn.
func (b *Blob) close() error {
	b.mu.Lock()
	b.gone = true
	b.nudgeLocked()
	b.mu.Unlock()
	b.stop(os.ErrClosed)
	var errs []error
	if b.f != nil && b.dirty && b.stored.Load() > 0 {
		errs = append(errs, b.writeMark())
	}
	if errors.Join(errs...) == nil {
		b.endSibling(b.complete)
	}
	b.sibling.close()
	for _, o := range b.origins {
		errs = append(errs, o.close())
	}
	b.m.metrics.open.Dec()
	if err := errors.Join(append(errs, b.closeFile())...); err != nil {
		return fmt.Errorf("close blob %s: %w", b.name, err)
	}
	return nil
}

// writeMark makes what is present durable and says so in NAME.clean. The caller has
// the turn durable, or is the only one left.
func (b *Blob) writeMark() error {
	if b.f == nil { // the kernel's file needs no mark
		return nil
	}
	b.mu.Lock()
	clean := newBitmap(b.table.Units())
	for i := range clean {
		clean[i].Store(b.present[i].Load())
	}
	b.dirty = false
	b.mu.Unlock()
	failpoint.Hit("blobmgr.sync")
	err := b.cache.Datasync()
	if err != nil {
		b.lost()
	} else {
		b.settled(clean)
	}
	if err == nil {
		err = b.m.dir.sync(b.name + metaSuffix)
	}
	if err == nil {
		failpoint.Hit("blobmgr.clean")
		err = b.m.dir.write(b.name+cleanSuffix, marshalClean(b.metaSum, clean), true)
		failpoint.Hit("blobmgr.cleaned")
	}
	if err != nil {
		b.mu.Lock()
		b.dirty = true
		b.mu.Unlock()
		return fmt.Errorf("make cache file %s durable: %w", b.Path(), err)
	}
	return nil
}
