package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/blobmgr"
)

const (
	// graceTicks are the ticks of a grace.
	graceTicks = 10
	// quotaEvery is how often the account of what the cache takes is compared with what
	// it does take.
	quotaEvery = 30 * time.Second
	// maxReserve of the file system, or a hundredth of it, is kept free.
	maxReserve = 64 << 20
)

// A quota keeps the cache below its limit, in this order: images that are not in use go,
// the least recently used first; then, with fanotify, data of images that are, the least
// recently read first, pinned images excepted (evict.go). Data are put in doubt before
// the cache is full, so that they can go at once when it is.
//
// Only one goroutine has it.
type quota struct {
	d *Daemon

	// What the cache took when it was looked at last, and how much it had grown.
	looked       time.Time
	bytes, grown int64
	high, low    int64 // the marks; lower than asked for when the disk is full
	hopeless     bool  // it was logged that nothing more can go

	now     uint32 // of blobmgr's clock
	thaw    thaw
	readers quiescence
	blind   bool // it cannot be seen which readers are on their way
}

// watchQuota keeps the cache below its limit until the daemon ends.
func (d *Daemon) watchQuota() {
	select {
	case <-d.adopted: // or what a predecessor had open would look unused
	case <-d.ctx.Done():
		return
	}
	defer d.blobs.SetRoom(blobmgr.Room{Hopeless: true})
	q := &quota{d: d, readers: quiescence{proc: "/proc"}}
	t := time.NewTicker(max(d.o.Grace/graceTicks, time.Millisecond))
	defer t.Stop()
	told := ""
	for short := false; ; {
		err := q.round(d.ctx, short)
		if err != nil && d.ctx.Err() == nil && err.Error() != told { // once: it is tried again soon
			told = err.Error()
			d.log.Warn("make room in the cache", "err", err)
		}
		short = false
		select {
		case <-d.ctx.Done():
			return
		case <-t.C:
			q.tick()
		case <-d.closed: // there may be something to remove now
			q.looked = time.Time{}
		case <-d.blobs.Short():
			short = true
		}
	}
}

// tick has the time go by that readers have who are on their way.
func (q *quota) tick() {
	q.now = q.d.blobs.Tick()
	t, ok := q.d.kernel.(*fanotifyTransport)
	if !ok {
		return
	}
	err := errors.Join(q.thaw.tick(), q.readers.look(q.now, t.doubtful()))
	if err != nil && !q.blind {
		q.d.log.Warn("make room in the cache", "err", err)
	}
	q.blind = err != nil
}

// safe returns the tick before which data must have been put in doubt to go now; 0: none.
func (q *quota) safe() uint32 {
	if q.blind || !q.thaw.over() || q.now <= graceTicks {
		return 0
	}
	return min(q.now-graceTicks, q.readers.passed)
}

// round makes room if it is needed, and says how much there is; short says that a read
// waits for it. With an error nobody need wait.
func (q *quota) round(ctx context.Context, short bool) error {
	used := q.used()
	if q.looked.IsZero() || short || used > q.prepare() || time.Since(q.looked) > quotaEvery {
		if err := q.look(); err != nil {
			q.d.blobs.SetRoom(blobmgr.Room{Hopeless: true})
			return err
		}
		used = q.used()
	}
	coming, err := false, error(nil)
	if used > q.prepare() {
		coming, err = q.shrink(ctx, used, used > q.high)
	} else {
		q.hopeless = false
	}
	if t, ok := q.d.kernel.(*fanotifyTransport); ok {
		t.settle(used <= (q.high+q.low)/2)
	}
	q.d.blobs.SetRoom(blobmgr.Room{
		Unasked: q.low - q.bytes + q.grown, All: q.high - q.bytes + q.grown,
		Hopeless: !coming && (used > q.high || err != nil),
	})
	return err
}

// prepare is from where on data are put in doubt.
func (q *quota) prepare() int64 { return q.high - (q.high-q.low)/4 }

// used is what the cache takes by account, with what is on its way into it.
func (q *quota) used() int64 {
	grown, flying := q.d.blobs.Growth()
	return q.bytes + grown - q.grown + flying
}

// look finds out what the cache really takes, and where the marks are.
func (q *quota) look() error {
	grown, _ := q.d.blobs.Growth()
	all, err := q.d.listKept()
	if err != nil {
		return err
	}
	q.bytes, q.grown, q.looked = q.d.usage(all), grown, time.Now()
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Join(q.d.o.Root, "cache"), &fs); err != nil {
		return fmt.Errorf("ask for free disk: %w", err)
	}
	left := (int64(fs.Bavail) - min(maxReserve/fs.Bsize, int64(fs.Blocks)/100)) * fs.Bsize
	q.high = min(q.d.o.High, q.bytes+left)
	q.low = q.high - (q.d.o.High - q.d.o.Low)
	return nil
}

// shrink makes the cache as small as its low mark if now, else it prepares for that. It
// reports whether data are about to go.
func (q *quota) shrink(ctx context.Context, used int64, now bool) (coming bool, err error) {
	if now {
		flying := used - q.bytes
		err := q.d.evict(ctx, q.high-flying, q.low-flying)
		if err != nil && !errors.Is(err, errNoRoom) {
			return false, err
		}
		if lerr := q.look(); err == nil || lerr != nil {
			return err == nil, lerr
		}
		used = q.used()
	}
	t, ok := q.d.kernel.(*fanotifyTransport)
	if ok {
		coming, err = t.reclaim(ctx, q, used-q.low, used-q.high)
	}
	if now && !coming && !q.hopeless {
		q.hopeless = true
		err = errors.Join(err, fmt.Errorf("it takes %d bytes, more than its high mark of %d: %w", used, q.high, errNoRoom))
	}
	if lerr := q.look(); lerr != nil {
		return coming, lerr
	}
	return coming, err
}
