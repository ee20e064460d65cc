package fanotify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/failpoint"
)

var (
	errReady = errors.New("panic in Ready")
	errFill  = errors.New("panic in Fill")
)

// fill makes the range of e present and answers.
func (s *server) fill(ctx context.Context, e event, w watched, start time.Time) {
	defer func() {
		s.count.inFlight.Add(-1)
		<-s.slots
	}()
	s.await(ctx, w.object, e.off, e.n, func(err error) {
		if errors.Is(err, errLeft) {
			_ = unix.Close(int(e.fd)) // nothing is read any more, so no event gets its number
			return
		}
		if err != nil {
			s.deny(e, w.name, start, err)
		} else {
			s.count.filled.Add(1)
			s.answer(e, allow)
		}
		s.observe(OpFill, start, err)
	})
}

// await makes a range present and calls finish, once, with how that went. finish does
// not wait for a Fill that ignores the end of its time; await does.
func (s *server) await(ctx context.Context, o Object, off, n int64, finish func(error)) {
	ctx, cancel := context.WithTimeout(ctx, s.o.Deadline)
	defer cancel()
	var once sync.Once
	stop := context.AfterFunc(ctx, func() { once.Do(func() { finish(context.Cause(ctx)) }) })
	defer stop()
	failpoint.Hit("fanotify.fill")
	err := callFill(ctx, o, off, n, s.o.Logger)
	failpoint.Hit("fanotify.filled")
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errLeft) {
		err = cause
	}
	once.Do(func() { finish(err) })
}

func callReady(o Object, off, n int64) (ready bool, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errReady, p)
		}
	}()
	return o.Ready(off, n), nil
}

func callFill(ctx context.Context, o Object, off, n int64, l *slog.Logger) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errFill, p)
			l.Error("panic in Fill", "off", off, "len", n, "err", err, "stack", string(debug.Stack()))
		}
	}()
	return o.Fill(ctx, off, n)
}
