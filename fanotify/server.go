package fanotify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/failpoint"
)

const (
	// largestEvent is room for one event with records that do not exist yet.
	largestEvent = 4096
	// batch is the most events taken with one read(2).
	batch = 256
	// At its end Serve answers the queue until nothing has come for drainQuiet,
	// because a failed read is tried again at once (readahead first, then the
	// page itself), but no longer than drainTime.
	drainQuiet = 20 * time.Millisecond
	drainTime  = time.Second
	// errorPause slows the loop down when the kernel refuses a read for lack of
	// something that a moment may bring back.
	errorPause = 10 * time.Millisecond
)

var (
	errCountZero = errors.New("no bytes are asked for: somebody changes the file's size")
	errUnknown   = errors.New("an event of a file that is not watched")
	errOverflow  = errors.New("the queue of the fanotify group overflowed: readers have seen holes; unmount all images and mount them again")
	errNoSlot    = fmt.Errorf("the journal has no place for descriptors above %d: lower the limit of open files (RLIMIT_NOFILE)", journalSlots)
)

// Serve answers events until ctx is done and returns nil then. Each event gets
// exactly one answer. When ctx ends, every Fill is told to stop and its reader
// gets EIO at once, the queue is answered (what is ready is allowed, all else
// denied), and Serve returns when the last Fill has. Readers that come after
// that wait until the group is served again, by anybody, or closed; so unmount
// first. Serve never closes the group.
//
// What another process left unanswered (see [Options].Journal) is filled meanwhile,
// as much at a time as new events, and answered. What has a number that could not be
// reserved comes first, before anything is read.
//
// A group is served once at a time. Any error but the misuse of that means the
// descriptor is gone.
func (g *Group) Serve(ctx context.Context) error {
	if !g.serving.CompareAndSwap(false, true) {
		return errors.New("serve fanotify group: it is being served already")
	}
	defer g.serving.Store(false)
	if !g.journal.hold() {
		return fmt.Errorf("serve fanotify group: %w", os.ErrClosed)
	}
	defer g.journal.release()
	s, err := newServer(g)
	if err != nil {
		return fmt.Errorf("serve fanotify group: %w", err)
	}
	defer s.headroom.release()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	reading, stop := s.untilLeave(ctx, cancel)
	defer stop()
	first, rest := g.split()
	s.resume(ctx, first)
	s.fills.Go(func() { s.resume(ctx, rest) })
	err = s.loop(ctx, reading)
	if g.leaving.Err() == nil {
		cancel(nil)
		if err == nil {
			err = s.drain(ctx)
		}
	}
	s.fills.Wait()
	if err != nil {
		return fmt.Errorf("serve fanotify group: %w", err)
	}
	return nil
}

// A server is one run of Serve. Its reader is the goroutine of Serve: it takes
// events from the queue, answers what is ready and starts a goroutine for each
// event that has to wait. It takes no more events than it has slots for, so that
// the rest waits in the kernel, where it costs no descriptor.
type server struct {
	*Group
	slots    chan struct{} // one for each Fill under way
	fills    sync.WaitGroup
	headroom *headroom

	conn   syscall.RawConn
	buf    []byte                // the journal's, if there is one
	used   int                   // bytes of it that the last read may have written
	readFn func(fd uintptr) bool // s.tryRead, made once to keep reads free of allocation
	size   int                   // its argument
	n      int                   // and its results
	err    error
}

func newServer(g *Group) (*server, error) {
	conn, err := g.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("read the limit of open files: %w", err)
	}
	slots := int(max(1, min(uint64(g.o.MaxInFlight), limit.Cur/2)))
	if slots < g.o.MaxInFlight {
		g.o.Logger.Warn("fewer fills at a time than configured, for the limit of open files (RLIMIT_NOFILE)", "n", slots)
	}
	spare, err := newHeadroom()
	if err != nil {
		return nil, err
	}
	s := &server{Group: g, slots: make(chan struct{}, slots), headroom: spare, conn: conn}
	s.readFn = s.tryRead
	size := max(largestEvent, min(slots, batch)*eventLen)
	if g.journal == nil {
		s.buf = make([]byte, size)
	} else {
		s.buf, s.used = g.journal.buffer()[:size], size
	}
	return s, nil
}

// loop takes and dispatches events until reading is done, which ends before ctx.
func (s *server) loop(ctx, reading context.Context) error {
	expired := make(chan struct{})
	stop := context.AfterFunc(reading, func() {
		defer close(expired)
		_ = s.f.SetReadDeadline(time.Unix(1, 0)) // fails only when the group is closed, which ends the loop too
	})
	defer func() {
		if !stop() {
			<-expired // or it would end the reads of drain
		}
	}()
	for reading.Err() == nil {
		free, ok := s.admit(reading)
		if !ok {
			break
		}
		if err := s.take(ctx, free); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			return err
		}
	}
	return nil
}

// drain answers the queue while fills come to their end. ctx is done, so
// nothing more waits for a Fill.
func (s *server) drain(ctx context.Context) error {
	for end := time.Now().Add(drainTime); len(s.slots) > 0 || time.Now().Before(end); {
		_ = s.f.SetReadDeadline(time.Now().Add(drainQuiet))
		err := s.take(ctx, cap(s.slots))
		if quiet := errors.Is(err, os.ErrDeadlineExceeded); quiet && len(s.slots) == 0 {
			break
		} else if err != nil && !quiet {
			return err
		}
	}
	_ = s.f.SetReadDeadline(time.Time{})
	return nil
}

// admit waits until at least one slot is free and returns how many are.
func (s *server) admit(ctx context.Context) (free int, ok bool) {
	select {
	case s.slots <- struct{}{}: // only the reader takes slots, so this one stays free for it
		<-s.slots
	case <-ctx.Done():
		return 0, false
	}
	return cap(s.slots) - len(s.slots), true
}

// take waits for events and dispatches those that have come, up to room. The
// error says that the deadline has passed or that nothing can be read any more.
// Errors that concern an event do not count: the kernel has denied that event.
func (s *server) take(ctx context.Context, room int) error {
	n, err := s.read(min(room*eventLen, len(s.buf)))
	if errors.Is(err, unix.EINVAL) { // the first event has more records than any has today
		n, err = s.read(len(s.buf))
	}
	switch errno := unix.Errno(0); {
	case err == nil && n == 0:
		return io.ErrUnexpectedEOF
	case err == nil:
	case !errors.As(err, &errno), errno == unix.EBADF:
		return err
	default:
		s.count.refused.Add(1)
		s.logDenial("read the fanotify queue", event{}, "", 0, err)
		select {
		case <-time.After(errorPause):
		case <-ctx.Done():
		}
		return nil
	}
	failpoint.Hit("fanotify.read")
	s.dispatchAll(ctx, s.buf[:n], time.Now())
	return nil
}

// dispatchAll dispatches the events of p, what one read has brought.
func (s *server) dispatchAll(ctx context.Context, p []byte, start time.Time) {
	for len(p) > 0 {
		e, rest, err := parseEvent(p)
		s.count.events.Add(1)
		s.journal.use(e.fd)
		s.dispatch(ctx, e, err, start)
		s.journal.strike(p)
		p = rest
	}
}

// read waits for the queue and reads at most size bytes of it, once. In a journal,
// what follows the last event is always zeros.
func (s *server) read(size int) (int, error) {
	if s.journal != nil {
		clear(s.buf[:s.used])
	}
	s.used, s.size = size, size
	if err := s.conn.Read(s.readFn); errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, err
	} else if err != nil {
		return 0, os.ErrClosed // the only other reason, which Read calls something else
	}
	if s.err == nil {
		s.used = s.n
	}
	return s.n, s.err
}

func (s *server) tryRead(fd uintptr) bool {
	s.headroom.restore()
	s.n, s.err = unix.Read(int(fd), s.buf[:s.size])
	for s.err == unix.EINTR {
		s.n, s.err = unix.Read(int(fd), s.buf[:s.size])
	}
	return s.err != unix.EAGAIN
}

// dispatch answers e, or hands it to a goroutine that will.
func (s *server) dispatch(ctx context.Context, e event, malformed error, start time.Time) {
	switch {
	case malformed != nil:
		s.count.malformed.Add(1)
		s.deny(e, "", start, malformed)
		return
	case e.overflow():
		s.count.overflows.Add(1)
		s.deny(e, "", start, errOverflow)
		return
	case e.fd < 0:
		s.count.refused.Add(1)
		s.logDenial("the kernel could not open a file for an event and denied it", e, "", 0, unix.Errno(-e.fd))
		return
	case e.pid == s.pid:
		// Waiting for ourselves would be for ever.
		s.ownRead.Do(func() {
			s.o.Logger.Warn("this process used a watched file through a descriptor that was opened after the mark; let through", "off", e.off, "len", e.n)
		})
		s.count.own.Add(1)
		s.answer(e, allow)
		return
	}
	w, err := s.lookup(e)
	if err != nil {
		s.deny(e, "", start, err)
		return
	}
	switch ready, err := callReady(w.object, e.off, e.n); {
	case err != nil:
		s.deny(e, w.name, start, err)
		s.observe(OpReady, start, err)
	case ready:
		s.count.ready.Add(1)
		s.answer(e, allow)
		s.observe(OpReady, start, nil)
	default:
		s.start(ctx, e, w, start)
	}
}

// start starts the fill of e. A slot is free, or nearly: take reads no more
// events than there are slots, but for one that is larger than any today.
func (s *server) start(ctx context.Context, e event, w watched, start time.Time) {
	if ctx.Err() == nil {
		select {
		case s.slots <- struct{}{}:
			failpoint.Hit("fanotify.slotting")
			if !s.journal.set(e.fd, slotFile, w.id, e.off, e.n) {
				<-s.slots
				s.deny(e, w.name, start, errNoSlot)
				s.observe(OpFill, start, errNoSlot)
				return
			}
			failpoint.Hit("fanotify.slotted")
			s.count.inFlight.Add(1)
			s.fills.Go(func() { s.fill(ctx, e, w, start) })
			return
		case <-ctx.Done():
		}
	}
	s.deny(e, w.name, start, ctx.Err())
	s.observe(OpFill, start, ctx.Err())
}

// lookup finds the file of e. Numbers of descriptors are used again, so there is
// nothing to remember between events.
func (s *server) lookup(e event) (watched, error) {
	if e.n == 0 {
		return watched{}, errCountZero // truncate(2) by somebody else
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(e.fd), &st); err != nil {
		return watched{}, fmt.Errorf("stat the file of an event: %w", err)
	}
	w, ok := s.find(inode{st.Dev, st.Ino})
	if !ok {
		return w, fmt.Errorf("%w: inode %d", errUnknown, st.Ino)
	}
	return w, nil
}

// answer writes the answer, clears the slot and closes the event's descriptor, in
// this order: a closed number may be given to the next event, which the answer would
// meet. The slot of an event that could not be answered stays for a successor.
func (s *server) answer(e event, answer uint32) {
	err := s.respond(e.fd, answer)
	failpoint.Hit("fanotify.answered")
	if err == nil || errors.Is(err, unix.ENOENT) {
		s.journal.clear(e.fd)
	}
	failpoint.Hit("fanotify.cleared")
	if err != nil {
		s.count.lost.Add(1)
		s.logDenial("answer a fanotify event", e, "", 0, err)
	}
	_ = unix.Close(int(e.fd)) // read-only: nothing to lose
}

// deny answers EIO if e has a descriptor, and logs why.
func (s *server) deny(e event, name string, start time.Time, why error) {
	if e.fd >= 0 {
		s.count.denied.Add(1)
		s.answer(e, deny)
	}
	s.logDenial("read denied", e, name, time.Since(start), why)
}

func (s *server) observe(op Op, start time.Time, err error) {
	if s.o.Observer != nil {
		s.o.Observer(op, time.Since(start), err)
	}
}

// logDenial is limited: a program that retries a failing read would fill the log.
func (s *server) logDenial(what string, e event, object string, took time.Duration, err error) {
	if s.logLimit.Allow() {
		s.o.Logger.Error(what, "object", object, "off", e.off, "len", e.n, "dur", took, "err", err)
	}
}
