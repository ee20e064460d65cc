package backend

import (
	"context"
	"errors"
	"io"
	"time"
)

// minProgress is how many bytes count as progress. A server that drips slower than
// this per stall time is as good as dead.
const minProgress = 4 << 10

// A Watch ends a request that makes no progress. It belongs to one goroutine at a time.
type Watch struct {
	ctx    context.Context // the request's
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
	got    int // bytes since the timer was set
}

// NewWatch returns a watch that ends its Context after stall without progress. Stop
// frees it.
func NewWatch(ctx context.Context, stall time.Duration) *Watch {
	w := &Watch{stall: stall}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.timer = time.AfterFunc(stall, func() { w.cancel(stallError(stall)) })
	return w
}

// Context is what the watched request is made with.
func (w *Watch) Context() context.Context { return w.ctx }

// Progress counts n bytes that went over the network.
func (w *Watch) Progress(n int) {
	if w.got += n; w.got >= minProgress {
		w.got = 0
		w.timer.Reset(w.stall)
	}
}

// Answered counts the head of an answer as progress, however short it is.
func (w *Watch) Answered() { w.Progress(minProgress) }

// Stop ends the watch, and its Context.
func (w *Watch) Stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// Reader counts what is read from r.
func (w *Watch) Reader(r io.Reader) io.Reader { return &watchedReader{r, w} }

type watchedReader struct {
	r io.Reader
	w *Watch
}

func (r *watchedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.w.Progress(n)
	return n, err
}

// Fail says why a request failed with err: because the watch ended it, because its
// context is done, or err itself without secrets.
func (w *Watch) Fail(err error) error {
	if err == nil {
		return nil
	}
	if stalled, ok := errors.AsType[stallError](context.Cause(w.ctx)); ok {
		return stalled
	}
	if err := w.ctx.Err(); err != nil {
		return err
	}
	return RedactError(err)
}

// stallError says that a request made no progress for so long.
type stallError time.Duration

func (e stallError) Error() string { return "no progress for " + time.Duration(e).String() }
func (e stallError) Timeout() bool { return true }
