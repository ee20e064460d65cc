package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/erofsd/erofsd/internal/chunk"
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
	// attaching serialises what changes cache, which is f or what is attached.
	attaching turn
	cache     cacheFile
	work      sync.WaitGroup // goroutines; added to under mu while not closed

	present  bitmap
	stored   atomic.Int64 // bytes present
	fetched  atomic.Int64
	requests atomic.Int64
	corrupt  atomic.Int64
	ahead    *readahead

	// Completion:
	hurry    atomic.Bool  // a reader wants everything
	cursor   atomic.Int64 // unit where to look for absent ones first
	troubled atomic.Bool  // the last request failed

	digests sync.RWMutex // guards the digests in table
	table   *chunk.Table
	gen     atomic.Uint64 // changes with them; written under digests and mu

	durable turn // guards metaSum and the files NAME.meta and NAME.clean
	metaSum [32]byte

	mu sync.Mutex // guards what follows
	// ctx is the base of every fetch: a fetch outlives the waiter that began it.
	ctx      context.Context
	cancel   context.CancelCauseFunc
	suspect  bitmap // in the cache file, but not verified
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
	if _, err := learn(b.table, s.Digests); err != nil {
		return nil, err
	}
	b.fresh = isNew
	if err := b.openFiles(ctx, isNew || changed > 0); err != nil {
		return nil, err
	}
	b.ahead.widen(s.Prefetch.Window)
	return b, nil
}

// loadTable gets the chunk table from an earlier Open or from s; isNew says that it
// is from s.
func (b *Blob) loadTable(ctx context.Context, s Source) (isNew bool, err error) {
	if p := b.m.dir.read(b.name+metaSuffix, maxMeta(b.entry)); p != nil {
		e, t, err := parseMeta(p)
		if err == nil && e != b.entry {
			return false, errOther
		}
		if err == nil {
			b.table, b.metaSum = t, metaSum(p)
			return false, nil
		}
		b.m.log.Warn("reading the chunk table again, the copy in the cache is unusable", "blob", b.name, "err", err)
	}
	b.table, err = readTable(ctx, s)
	return true, err
}

// openFiles opens the cache file and finds what is present in it, unless the kernel
// will bring it.
func (b *Blob) openFiles(ctx context.Context, writeMeta bool) error {
	b.size = b.table.Size()
	units := b.table.Units()
	b.present, b.suspect = newBitmap(units), newBitmap(units)
	b.ahead = newReadahead(b)
	if b.m.opt.Attached {
		b.count()
	} else if err := b.openCache(); err != nil {
		return err
	}
	var err error
	if writeMeta {
		err = b.writeMeta()
	}
	if err == nil && b.f != nil {
		err = b.loadPresence()
	}
	if err != nil {
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
	f, err := b.m.dir.openCache(b.name, b.size)
	if err != nil {
		return fmt.Errorf("open cache file: %w", err)
	}
	b.f, b.cache = f, sparseFile{f}
	if b.m.opt.wrap != nil {
		b.cache = b.m.opt.wrap(b.cache)
	}
	return nil
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
	if !b.m.dir.exists(b.name + cleanSuffix) {
		return nil
	}
	b.dirty = true
	return b.m.dir.removeDurably(b.name + cleanSuffix)
}

// share adds the image of s to an open blob. The caller has the name's turn.
func (b *Blob) share(ctx context.Context, s Source) error {
	if plainEntry(s.Entry) != b.entry {
		return errOther
	}
	b.digests.RLock()
	changed, err := compare(b.table, s.Digests)
	b.digests.RUnlock()
	if conflict := (*chunk.ConflictError)(nil); errors.As(err, &conflict) {
		return fmt.Errorf("%w: %w", errOther, err)
	}
	if err != nil {
		return err
	}
	if changed > 0 {
		if err := b.extend(ctx, s.Digests); err != nil {
			return err
		}
	}
	b.addOrigin(s)
	b.wish(s.Prefetch)
	b.images++
	return nil
}

// extend records digests that are not known yet. Units that have one are verified
// again; Done may be open again.
func (b *Blob) extend(ctx context.Context, ds []ChunkDigest) error {
	if err := b.durable.take(ctx); err != nil {
		return err
	}
	defer b.durable.give()
	// The mark goes first: what it lists may be written again from here on.
	if err := b.removeMark(); err != nil {
		return err
	}
	units, err := b.doubtAll(ds)
	if err != nil {
		return err
	}
	if units > 0 {
		b.nudge()
	}
	b.digests.RLock()
	p := marshalMeta(b.entry, b.table)
	b.digests.RUnlock()
	b.metaSum = metaSum(p)
	return b.m.dir.write(b.name+metaSuffix, p, b.m.opt.Attached)
}

func (b *Blob) doubtAll(ds []ChunkDigest) (int, error) {
	b.digests.Lock()
	defer b.digests.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	units, err := learn(b.table, ds)
	b.gen.Add(1)
	b.doubt(units)
	b.dirty = true
	if b.complete && b.missing > 0 {
		b.complete = false
		b.done = make(chan struct{})
	}
	return len(units), err
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
	if _, id, scoped := strings.Cut(b.name, ","); scoped {
		return id
	}
	return b.name
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
	err := b.cache.Datasync()
	if err == nil {
		err = b.m.dir.sync(b.name + metaSuffix)
	}
	if err == nil {
		err = b.m.dir.write(b.name+cleanSuffix, marshalClean(b.metaSum, clean), true)
	}
	if err != nil {
		b.mu.Lock()
		b.dirty = true
		b.mu.Unlock()
		return fmt.Errorf("make cache file %s durable: %w", b.Path(), err)
	}
	return nil
}
