package fanotify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// filesAtOnce is how many files are filled at a time for one event of which the file
// is unknown.
const filesAtOnce = 16

var (
	errLeftRange = errors.New("the journal has an impossible range for it")
	errLeftState = errors.New("the journal has an impossible state for it")
	errNoFile    = errors.New("no file that is watched or expected has this range")
)

// startAfresh empties the journal of a new group: what it had was of another one.
func (g *Group) startAfresh() error {
	g.journal.reset()
	return nil
}

// takeOver reads what the journal says of the process before. Nothing is read from
// the queue yet, and nothing filled. No state of the journal is an error: what it
// does not vouch for is denied.
func (g *Group) takeOver() error {
	if err := g.reserved.reserve(g.journal); err != nil {
		return err
	}
	failpoint.Hit("fanotify.takeover.reserved")
	refused := g.adopt()
	g.left = g.journal.left()
	g.reserved.keep(g.left)
	g.count.adopted.Store(int64(len(g.left)) + refused)
	swept := g.sweep()
	failpoint.Hit("fanotify.takeover.swept")
	if len(g.left) > 0 || refused > 0 {
		g.o.Logger.Warn("another process left reads unanswered: they are being answered", "n", len(g.left), "denied", refused)
	}
	if swept > 0 {
		g.o.Logger.Error("reads were denied that the journal of the process before did not know; report this", "n", swept)
	}
	return nil
}

// adopt gives slots to the events that are in the read buffer only, because the next
// read wipes it, and denies what cannot be filled whatever comes.
func (g *Group) adopt() (refused int64) {
	j := g.journal
	for e, err := range j.events() {
		j.use(e.fd)
		s := j.slot(e.fd)
		known := s != nil && s.state.Load() != slotEmpty
		switch {
		case s == nil, err != nil, e.n == 0, known && (s.off != e.off || s.n != e.n):
			if g.denyByNumber(e.fd) {
				refused++
			}
			j.clear(e.fd)
		case !known:
			j.set(e.fd, slotUnknown, inode{}, e.off, e.n)
		}
	}
	clear(j.buffer())
	return refused
}

// sweep denies what has the number of an event and is not in the journal: there is no
// such thing, but if there were, the answer to a new event with its number would be
// taken for its own.
func (g *Group) sweep() (swept int64) {
	for fd := range g.journal.numbers() {
		if g.journal.slot(fd).state.Load() == slotEmpty && g.denyByNumber(fd) {
			swept++
		}
	}
	g.count.swept.Add(swept)
	return swept
}

// denyByNumber reports whether the kernel knew an event with this number.
func (g *Group) denyByNumber(fd int32) bool {
	err := g.respond(fd, deny)
	if err == nil {
		g.count.denied.Add(1)
	}
	return err == nil
}

// DenyPending gives EIO to every reader whose event another process took from
// the queue and left unanswered, which is what its death leaves. The kernel knows
// those events by the descriptor numbers of that process alone, so all numbers
// are tried (some 100 ms for a million). It must come before Serve: a new event
// may get an old number, and the older event would swallow its answer.
func (g *Group) DenyPending() error {
	if !g.serving.CompareAndSwap(false, true) {
		return errors.New("deny pending fanotify events: the group is being served")
	}
	defer g.serving.Store(false)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	for fd := range int32(min(limit.Max, sweepLimit)) {
		switch err := g.respond(fd, deny); {
		case err == nil:
			g.count.denied.Add(1)
		case !errors.Is(err, unix.ENOENT):
			return fmt.Errorf("deny pending fanotify event %d: %w", fd, err)
		}
	}
	return nil
}

// split takes what was left out of the group: that which has to be answered before
// the queue is read, because a new event may get its number, and the rest.
func (g *Group) split() (first, rest []leftover) {
	for _, l := range g.left {
		if g.reserved.holds(l.fd) {
			rest = append(rest, l)
		} else {
			first = append(first, l)
		}
	}
	g.left = nil
	return first, rest
}

// resume fills and answers what a dead process left. It returns when all of it has
// been answered, which is at the deadline of the last one at the latest.
func (s *server) resume(ctx context.Context, left []leftover) {
	room := make(chan struct{}, cap(s.slots))
	for _, l := range left {
		room <- struct{}{}
		s.fills.Go(func() { s.fillLeft(ctx, l, func() { <-room }) })
	}
	for range cap(room) {
		room <- struct{}{}
	}
}

// fillLeft makes the range of l present, answers it and calls done. It returns when
// Fill has.
func (s *server) fillLeft(ctx context.Context, l leftover, done func()) {
	s.count.inFlight.Add(1)
	defer s.count.inFlight.Add(-1)
	start := time.Now()
	w, err := s.ownerOf(l)
	finish := func(err error) {
		if !errors.Is(err, errLeft) {
			s.answerLeft(l, w.name, start, err)
		}
		done()
	}
	if err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		finish(err)
		return
	}
	s.await(ctx, w.object, l.off, l.n, finish)
}

// ownerOf finds the file of l, or all files when it is unknown.
func (s *server) ownerOf(l leftover) (watched, error) {
	switch {
	case l.off < 0 || l.n <= 0 || l.n > math.MaxInt64-l.off:
		return watched{}, errLeftRange
	case l.state == slotUnknown:
		return watched{object: everyFile{s.Group}, name: "every file"}, nil
	case l.state != slotFile:
		return watched{}, errLeftState
	}
	w, ok := s.find(l.id)
	if !ok {
		return w, fmt.Errorf("%w: inode %d", errUnknown, l.id.ino)
	}
	return w, nil
}

// answerLeft answers l by its number, and then lets go of that: of the slot first,
// for a number that is free may be another event's.
func (s *server) answerLeft(l leftover, name string, start time.Time, why error) {
	failpoint.Hit("fanotify.takeover.answer")
	answer, count := allow, &s.count.filled
	if why != nil {
		answer, count = deny, &s.count.denied
	}
	err := s.respond(l.fd, answer)
	failpoint.Hit("fanotify.takeover.answered")
	e := event{fd: l.fd, off: l.off, n: l.n}
	switch {
	case err == nil:
		count.Add(1)
		s.observe(OpFill, start, why)
		if why != nil {
			s.logDenial("read denied that another process left unanswered", e, name, time.Since(start), why)
		}
	case !errors.Is(err, unix.ENOENT): // which says that it had been answered
		s.count.lost.Add(1)
		s.logDenial("answer a fanotify event that another process left", e, name, time.Since(start), err)
		return
	}
	s.journal.clear(l.fd)
	s.reserved.give(l.fd)
}

// everyFile is the object of an event that was taken from the queue, but of which
// nobody had looked at the file. Its range is there when every file has it that somebody
// may read.
type everyFile struct{ g *Group }

func (everyFile) Ready(int64, int64) bool { return false }

func (a everyFile) Fill(ctx context.Context, off, n int64) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(filesAtOnce)
	var found atomic.Bool
	for _, w := range a.g.all() {
		if off >= w.size {
			continue
		}
		group.Go(func() error {
			err := w.fill(ctx, off, min(n, w.size-off), a.g.o.Logger)
			if errors.Is(err, ErrNotOpen) {
				return nil
			}
			found.Store(true)
			return err
		})
	}
	err := group.Wait()
	if err == nil && !found.Load() {
		return errNoFile
	}
	return err
}

// fill makes a range of one file present.
func (w *watched) fill(ctx context.Context, off, n int64, l *slog.Logger) error {
	if ready, err := callReady(w.object, off, n); err == nil && ready {
		return nil
	}
	if err := callFill(ctx, w.object, off, n, l); err != nil {
		return fmt.Errorf("fill %s: %w", w.name, err)
	}
	return nil
}
