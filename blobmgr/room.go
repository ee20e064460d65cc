package blobmgr

import (
	"cmp"
	"context"
	"math"
	"sync"
	"time"
)

// roomWait is the longest time that a read waits for room, unless Options say less. Then it
// is served all the same: the cache's limit is a wish, the read is not. Those that come
// after it do not wait again before something went: what is read all the time does not.
const roomWait = 20 * time.Second

// Room is how much more disk cache files may take, counted from Manager.Growth's grown.
type Room struct {
	Unasked int64 // up to here completion and prefetch go
	All     int64 // up to here readahead goes; above it reads wait for the next SetRoom
	// Hopeless says that reads above All would wait in vain: nothing can go.
	Hopeless bool
}

// A room keeps account of the disk that cache files take.
type room struct {
	short    chan struct{} // told, without waiting, when somebody waits
	patience time.Duration // of a read

	mu sync.Mutex // guards what follows
	Room
	limited bool // SetRoom was called
	grown   int64
	flying  int64         // what flights under way may add
	told    int           // calls of SetRoom
	evicted int64         // bytes, by Blob.Punch
	waits   int64         // of reads
	vain    bool          // one has waited, and nothing went
	changed chan struct{} // closed, and made again, when a waiter should look again
}

func newRoom(patience time.Duration) *room {
	return &room{
		patience: cmp.Or(patience, roomWait),
		Room:     Room{Unasked: math.MaxInt64, All: math.MaxInt64},
		short:    make(chan struct{}, 1), changed: make(chan struct{}),
	}
}

// SetRoom says how much more disk cache files may take. Without it there is no limit.
func (m *Manager) SetRoom(r Room) {
	m.room.mu.Lock()
	defer m.room.mu.Unlock()
	m.room.Room, m.room.limited = r, true
	m.room.told++
	m.room.wake()
}

// Growth returns how many bytes of disk cache files have taken since New, less what
// Blob.Punch gave back, and how many more what is under way may take. It is an account:
// blocks of the file system and removed files are not in it.
func (m *Manager) Growth() (grown, flying int64) {
	m.room.mu.Lock()
	defer m.room.mu.Unlock()
	return m.room.grown, m.room.flying
}

// Evicted returns how many bytes of disk Blob.Punch has given back since New, and how many
// times a read had to wait for room.
func (m *Manager) Evicted() (bytes, waits int64) {
	m.room.mu.Lock()
	defer m.room.mu.Unlock()
	return m.room.evicted, m.room.waits
}

// Short returns a channel that is sent to when a read waits for room, or found the disk
// full.
func (m *Manager) Short() <-chan struct{} { return m.room.short }

// wake makes waiters look again. The caller holds mu.
func (r *room) wake() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// take gives a read n bytes.
func (r *room) take(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flying += n
}

// try gives n bytes to what nobody waits for, if there is room.
func (r *room) try(n int64, k kind) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	limit := r.All
	if k == completion {
		limit = r.Unasked
	}
	if n > 0 && r.grown+r.flying+n > limit {
		return false
	}
	r.flying += n
	return true
}

// land ends what took n bytes and used some of them.
func (r *room) land(n, used int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flying -= n
	r.grown += used
	if n > used {
		r.wake()
	}
}

// fits reports whether what was taken is within the limit. The caller holds mu.
func (r *room) fits() bool { return r.grown+r.flying <= r.All }

// wait waits, as long as it is worth it, until what a read took is within the limit.
func (r *room) wait(ctx context.Context) {
	if !r.over() {
		return
	}
	t := time.NewTimer(r.patience)
	defer t.Stop()
	for {
		r.mu.Lock()
		ok, changed := r.fits() || r.Hopeless || r.vain, r.changed
		r.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-t.C:
			r.giveUp()
			return
		case <-ctx.Done():
			return
		}
	}
}

// giveUp lets all reads go on that wait.
func (r *room) giveUp() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.vain = true
	r.wake()
}

// over tells the owner if what was taken is above the limit, and reports whether waiting
// may help. It is told once for each read: it looks again by itself.
func (r *room) over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fits() {
		return false
	}
	r.tell()
	if r.Hopeless || r.vain {
		return false
	}
	r.waits++
	return true
}

// plead waits until there is room again after a write found the disk full, and reports
// whether there is.
func (r *room) plead(ctx context.Context) bool {
	r.mu.Lock()
	since, limited := r.told, r.limited
	r.tell()
	r.mu.Unlock()
	if !limited {
		return false
	}
	t := time.NewTimer(r.patience)
	defer t.Stop()
	for {
		r.mu.Lock()
		made, hopeless, changed := r.told > since && r.fits(), r.told > since && r.Hopeless, r.changed
		r.mu.Unlock()
		if made || hopeless {
			return made
		}
		select {
		case <-changed:
		case <-t.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// tell tells the owner that room is short.
func (r *room) tell() {
	select {
	case r.short <- struct{}{}:
	default: // it is told already
	}
}

// punched notes that n bytes were given back.
func (r *room) punched(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.grown -= n
	r.evicted += n
	r.vain = false
	r.wake()
}
