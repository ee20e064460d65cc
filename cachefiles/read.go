package cachefiles

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// maxQueued bounds the READs that wait for a place. Each is a task asleep in the
// kernel, which costs far more there than the 100 bytes here, so the bound is one
// that no machine reaches; beyond it READs fail.
const maxQueued = 64 << 10

// A read is one READ that has to be answered.
type read struct {
	id     uint32
	o      *object
	off, n int64
	start  time.Time
	once   sync.Once // the answer
}

// A queue admits READs in the order of their arrival, as many as are allowed to
// be under way. They wait here and not in the device, since they would hide the
// CLOSEs behind them. session.mu guards it.
type queue struct {
	waiting []*read
	running int
	bytes   int64       // sum of the ranges of those running
	expiry  *time.Timer // for the first one waiting; nil: not needed yet
}

// next takes the first READ that may run now.
func (q *queue) next(o *Options) *read {
	if len(q.waiting) == 0 {
		return nil
	}
	first := q.waiting[0]
	fits := q.running < o.MaxInFlight && (q.running == 0 || first.n <= o.MaxInFlightBytes-q.bytes)
	if !fits && !first.o.released {
		return nil
	}
	q.waiting[0] = nil
	q.waiting = q.waiting[1:]
	return first
}

// flush takes all that wait, for good.
func (q *queue) flush() []*read {
	if q.expiry != nil {
		q.expiry.Stop()
	}
	all := q.waiting
	q.waiting = nil
	return all
}

// expired takes those that came before the given time.
func (q *queue) expired(before time.Time) []*read {
	n := 0
	for n < len(q.waiting) && q.waiting[n].start.Before(before) {
		n++
	}
	late := q.waiting[:n:n]
	q.waiting = q.waiting[n:]
	return late
}

// handleRead queues a READ. One for an unknown object cannot even be failed: an
// answer goes through the object's own file. It cannot happen, because the kernel
// asks only for objects whose file is open here.
func (r *session) handleRead(m message, start time.Time) {
	failpoint.Hit("cachefiles.read")
	r.mu.Lock()
	o := r.objects[m.object]
	if o == nil {
		r.mu.Unlock()
		r.count.unknown.Add(1)
		r.logFailure("a read of an object that is not known; its reader waits until it is killed", nil, errClosed, "object", m.object, "msg", m.id)
		return
	}
	r.count.reads.Add(1)
	r.count.inFlight.Add(1)
	r.requests.Add(1)
	rd := &read{id: m.id, o: o, off: m.off, n: m.n, start: start}
	full := len(r.queue.waiting) >= maxQueued
	if !full {
		r.queue.waiting = append(r.queue.waiting, rd)
		r.admit()
	}
	r.mu.Unlock()
	if full {
		r.answer(rd, errQueue)
	}
}

// admit starts the READs that may run. The caller holds r.mu.
func (r *session) admit() {
	q := &r.queue
	for rd := q.next(&r.o); rd != nil; rd = q.next(&r.o) {
		if rd.o.released {
			r.work.Go(func() { r.answer(rd, errClosed) }) // takes r.mu
			continue
		}
		q.running++
		q.bytes += rd.n
		rd.o.users.Add(1)
		r.work.Go(func() { r.fill(rd) })
	}
	if len(q.waiting) == 0 {
		return
	}
	wait := time.Until(q.waiting[0].start.Add(r.o.Deadline))
	if q.expiry == nil {
		q.expiry = time.AfterFunc(wait, r.expire)
	} else {
		q.expiry.Reset(wait)
	}
}

// expire fails the READs whose time has passed in the queue.
func (r *session) expire() {
	r.mu.Lock()
	late := r.queue.expired(time.Now().Add(-r.o.Deadline))
	for _, rd := range late {
		if !rd.o.released {
			rd.o.users.Add(1) // keeps the file open for the answer
			defer rd.o.users.Done()
		}
	}
	r.admit()
	r.mu.Unlock()
	for _, rd := range late {
		r.answer(rd, context.DeadlineExceeded)
	}
}

// fill makes the range of a READ present and answers. The answer does not wait
// for a Fill that ignores the end of its time.
func (r *session) fill(rd *read) {
	defer func() {
		r.mu.Lock()
		r.queue.running--
		r.queue.bytes -= rd.n
		r.admit()
		r.mu.Unlock()
		rd.o.users.Done()
	}()
	ctx, cancel := context.WithDeadline(rd.o.ctx, rd.start.Add(r.o.Deadline))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { r.answer(rd, context.Cause(ctx)) })
	defer stop()
	select {
	case <-rd.o.ready:
		err := rd.o.err
		if err == nil {
			failpoint.Hit("cachefiles.fill")
			err = r.callFill(ctx, rd.o.object, rd.off, rd.n)
			failpoint.Hit("cachefiles.filled")
		}
		r.answer(rd, err)
	case <-ctx.Done():
		r.answer(rd, context.Cause(ctx))
	}
}

func (r *session) callFill(ctx context.Context, o Object, off, n int64) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked("Fill", p)
		}
	}()
	return o.Fill(ctx, off, n)
}

// answer completes a READ, the first time it is called. There is no way to tell
// an error: a READ that is completed while its range is a hole gives EIO. Once the
// kernel has closed the object there is nothing to answer, and the number may be
// another READ's.
func (r *session) answer(rd *read, err error) {
	rd.once.Do(func() {
		r.mu.Lock()
		drop := r.left || rd.o.closed
		r.mu.Unlock()
		switch {
		case drop:
			r.count.dropped.Add(1)
		case err != nil:
			r.count.failed.Add(1)
			r.logFailure("read failed", rd.o, fmt.Errorf("answered with EIO: %w", err), "msg", rd.id, "off", rd.off, "len", rd.n, "dur", time.Since(rd.start))
			r.complete(rd.o, rd.id)
		default:
			r.count.filled.Add(1)
			r.complete(rd.o, rd.id)
			failpoint.Hit("cachefiles.answered")
		}
		r.observe(OpRead, rd.start, err)
		r.count.inFlight.Add(-1)
		r.requests.Done()
	})
}
