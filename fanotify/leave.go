package fanotify

import (
	"context"
	"errors"
	"time"
)

// leaveTime is how long fills that are under way have to come to their end in Leave.
const leaveTime = 2 * time.Second

// errLeft ends fills whose events a successor answers.
var errLeft = errors.New("left to a successor")

// Leave ends Serve so that another process can go on: no more events are taken, fills that
// are under way have two seconds to come to their end, and what is unanswered then stays in
// the journal. Nothing is denied. Without a journal nobody could answer it: then Leave is for
// tests only. It does not wait; Serve returns.
func (g *Group) Leave() { g.leave() }

// untilLeave returns a context that ends with ctx or with Leave, which ends ctx too, a
// little later.
func (s *server) untilLeave(ctx context.Context, cancel context.CancelCauseFunc) (reading context.Context, stop func()) {
	reading, stopReading := context.WithCancel(ctx)
	off := context.AfterFunc(s.leaving, func() {
		stopReading()
		select {
		case <-time.After(leaveTime):
			cancel(errLeft)
		case <-ctx.Done():
		}
	})
	return reading, func() {
		off()
		stopReading()
	}
}
