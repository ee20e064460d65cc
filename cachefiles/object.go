package cachefiles

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/failpoint"
)

const (
	// sizeUnit is what the kernel rounds an object's size to.
	sizeUnit = 4096
	// A key that is refused again is answered after a pause, from refusalPause
	// doubling up to refusalMaxPause; a key that was not asked for in
	// refusalMemory starts anew. At most maxRefusals keys are remembered.
	refusalPause    = time.Millisecond
	refusalMaxPause = time.Second
	refusalMemory   = 10 * time.Second
	maxRefusals     = 1024
)

var errPanic = errors.New("panic")

// An object is one object of the kernel, from the OPEN on. A goroutine that calls
// its Object counts as a user; when it is released, the last user's end closes it.
type object struct {
	id     uint32
	key    Key
	file   *File
	ctx    context.Context // ends with the object, or Grace after Serve's
	cancel context.CancelCauseFunc
	users  sync.WaitGroup // Add only with session.mu, and before released

	ready  chan struct{} // closed when the following two do not change any more
	object Object        // nil: not accepted
	err    error         // of Opened, or why it was not accepted

	released bool // guarded by session.mu: no new users
	closed   bool // guarded by session.mu: the kernel has failed all its READs
}

type refusal struct {
	times int
	last  time.Time
}

// handleOpen takes the descriptor of an OPEN and has the handler asked. The
// object is known before the answer: a READ may come before copen returns.
func (r *session) handleOpen(m message, start time.Time) {
	r.count.opens.Add(1)
	r.count.objectsLive.Add(1)
	o := &object{id: m.object, key: m.key, ready: make(chan struct{})}
	o.ctx, o.cancel = context.WithCancelCause(r.base)
	o.file = &File{
		f: os.NewFile(uintptr(m.fd), "object "+m.key.Cookie), calls: r.d.calls, dir: r.d.dir,
		attach: attachTime, gone: o.ctx.Done(),
	}
	o.users.Add(1)
	r.mu.Lock()
	old := r.objects[o.id]
	if old != nil {
		old.closed = true
	}
	r.objects[o.id] = o
	r.mu.Unlock()
	if old != nil {
		r.release(old, errReplaced)
	}
	r.requests.Add(1)
	r.work.Go(func() {
		defer o.users.Done()
		r.open(o, m.id, start)
	})
}

// open asks the handler, answers the OPEN and hands the file over. The answer
// does not wait for a handler that ignores the end of its time: a mount waits
// for it uninterruptibly.
func (r *session) open(o *object, id uint32, start time.Time) {
	ctx, cancel := context.WithDeadline(o.ctx, start.Add(r.o.Deadline))
	defer cancel()
	var once sync.Once
	accepted := false
	answer := func(size int64, err error) {
		once.Do(func() {
			accepted = r.copen(o, id, size, err)
			r.observe(OpOpen, start, err)
			r.requests.Done()
		})
	}
	stop := context.AfterFunc(ctx, func() { answer(0, context.Cause(ctx)) })
	found, size, err := r.find(ctx, o.key)
	answer(size, err)
	stop()
	o.object = found
	if !accepted {
		o.err = errRefused
		close(o.ready)
		r.release(o, errRefused)
		return
	}
	o.err = r.callOpened(o)
	if o.err != nil {
		r.logFailure("use an object's file: its reads will fail until it is opened again", o, o.err)
	}
	close(o.ready)
}

// find calls the handler.
func (r *session) find(ctx context.Context, k Key) (found Object, size int64, err error) {
	if err := k.Validate(); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", err, unix.EINVAL)
	}
	if err := r.pause(ctx, k); err != nil {
		return nil, 0, err
	}
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked("Open", p)
		}
	}()
	found, err = r.h.Open(ctx, k)
	if err != nil {
		return nil, 0, err
	}
	size = found.Size()
	if size < 0 || size > math.MaxInt64-sizeUnit {
		err = fmt.Errorf("object %s has an impossible size of %d", k.Cookie, size)
	}
	return found, (size + sizeUnit - 1) / sizeUnit * sizeUnit, err
}

// copen answers an OPEN and reports whether the object is live now. If not, its
// file is closed: it would keep the mount's volume alive.
func (r *session) copen(o *object, id uint32, size int64, err error) (accepted bool) {
	r.mu.Lock()
	left := r.left
	r.refused(o.key, err)
	r.mu.Unlock()
	switch {
	case left: // a successor is asked again
	case err != nil:
		r.count.refused.Add(1)
		r.logFailure("object refused", o, err)
		r.command(encodeCopen(id, -int64(errnoOf(err))))
	default:
		failpoint.Hit("cachefiles.copen")
		accepted = r.command(encodeCopen(id, size))
		failpoint.Hit("cachefiles.copened")
	}
	if !accepted {
		_ = o.file.Close() // nothing was written
	}
	return accepted
}

// refused remembers that k was answered with err. The caller holds r.mu.
func (r *session) refused(k Key, err error) {
	if err == nil {
		delete(r.refusals, k)
		return
	}
	if len(r.refusals) >= maxRefusals {
		for k, f := range r.refusals {
			if time.Since(f.last) > refusalMemory {
				delete(r.refusals, k)
			}
		}
	}
	if f, known := r.refusals[k]; known || len(r.refusals) < maxRefusals {
		r.refusals[k] = refusal{times: f.times + 1, last: time.Now()}
	}
}

// pause waits if k was refused lately.
func (r *session) pause(ctx context.Context, k Key) error {
	r.mu.Lock()
	f := r.refusals[k]
	r.mu.Unlock()
	if f.times < 2 || time.Since(f.last) > refusalMemory {
		return nil
	}
	select {
	case <-time.After(min(refusalMaxPause, refusalPause<<min(f.times-2, 20))):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// errnoOf is what the kernel is told of an error.
func errnoOf(err error) syscall.Errno {
	const most = 4095
	if errno := syscall.Errno(0); errors.As(err, &errno) && errno > 0 && errno <= most {
		return errno
	}
	return unix.EIO
}

// handleClose ends an object. Reading the message was the answer; the kernel has
// failed the object's READs and may use their numbers again.
func (r *session) handleClose(m message) {
	r.count.closes.Add(1)
	r.mu.Lock()
	o := r.objects[m.object]
	if o != nil {
		o.closed = true
	}
	r.mu.Unlock()
	if o == nil {
		r.count.unknown.Add(1)
		r.o.Logger.Warn("the kernel closes an object that is not known", "object", m.object)
		return
	}
	failpoint.Hit("cachefiles.closed")
	r.release(o, errClosed)
}

// release forgets an object and closes it when its last user has ended.
func (r *session) release(o *object, why error) {
	r.mu.Lock()
	if r.objects[o.id] == o {
		delete(r.objects, o.id)
	}
	again := o.released
	o.released = true
	r.mu.Unlock()
	if again {
		return
	}
	start := time.Now()
	o.cancel(why)
	r.work.Go(func() {
		o.users.Wait()
		var err error
		if o.object != nil {
			err = r.callClose(o.object)
		}
		err = errors.Join(err, o.file.Close())
		if err != nil {
			r.logFailure("close an object", o, err)
		}
		r.count.objectsLive.Add(-1)
		r.observe(OpClose, start, err)
	})
}

// callOpened hands the file over, with a time of its own: the handler may have
// used up the OPEN's.
func (r *session) callOpened(o *object) (err error) {
	ctx, cancel := context.WithTimeout(o.ctx, r.o.Deadline)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked("Opened", p)
		}
	}()
	return o.object.Opened(ctx, o.file)
}

func (r *session) callClose(o Object) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked("Close", p)
		}
	}()
	return o.Close()
}

// panicked logs what recover returned, with the stack, and makes an error of it.
func (r *session) panicked(where string, p any) error {
	err := fmt.Errorf("%w in %s: %v", errPanic, where, p)
	r.logFailure("internal error", nil, err, "stack", string(debug.Stack()))
	return err
}
