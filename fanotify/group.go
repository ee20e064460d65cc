package fanotify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// What a group is made of (fanotify_init(2)). The queue must not be bounded: an
// event that does not fit is allowed. Event descriptors are read-only, because
// opening one for writing fails when the reader came through a read-only mount.
// FAN_REPORT_FD_ERROR (6.13, 6.12.5) keeps read(2) from failing for an event
// whose descriptor could not be made.
const (
	initFlags = unix.FAN_CLASS_PRE_CONTENT | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK |
		unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS | unix.FAN_REPORT_FD_ERROR
	eventFlags = unix.O_RDONLY | unix.O_CLOEXEC
)

// unwatchGrace is how long an unwatched file stays known. An event that was
// being raised when the mark went still needs its answer, and the kernel does not
// say when the last of them has been queued.
const unwatchGrace = time.Minute

// sweepLimit is more than the highest number that an event's descriptor can
// reasonably have: numbers are given lowest first, but their limit may be 2^30.
const sweepLimit = 1 << 20

// An Object is a file whose ranges can be made present. Both methods are called
// from several goroutines. Ranges lie in [0, 2^63) and may reach past the end of
// the file. Objects are compared, so they are pointers.
//
// The object may be called for up to a minute after [Group.Unwatch].
type Object interface {
	// Ready reports whether every byte of the range that lies in the file is
	// there and will stay. It does no I/O and never waits: all other events
	// wait for it.
	Ready(off, n int64) bool
	// Fill makes the range present; a nil error lets the reader see it. It
	// returns soon after ctx is done. A panic counts as an error. An ErrNotOpen says that
	// nobody but this process has the file open: an event is not of it.
	Fill(ctx context.Context, off, n int64) error
}

// ErrNotOpen is an [Object]'s error about a file that nobody can be reading.
var ErrNotOpen = errors.New("nobody has the file open")

// An Op is the way in which an event was answered.
type Op string

const (
	OpReady Op = "ready" // at once, by the reader of the queue
	OpFill  Op = "fill"  // after Fill
)

// Options for a group. The zero value works.
type Options struct {
	// Logger gets denials (limited to some per second) and what should not
	// happen. nil: nothing is logged.
	Logger *slog.Logger
	// Observer is told of every answer to an event of a known file: time from
	// taking the event from the queue to the answer, and the error of a denial.
	// It must not wait. nil: nobody is told.
	Observer func(op Op, d time.Duration, err error)
	// MaxInFlight bounds the events that wait for Fill, each with a goroutine
	// and a file descriptor. At the limit further events stay in the kernel's
	// queue. Default 1024; never more than half of the descriptors the process
	// may have.
	MaxInFlight int
	// Deadline is the time that Fill gets. Its reader then sees EIO, and the
	// next read tries anew. Default 60 s.
	Deadline time.Duration
	// Journal was made with [NewJournal], and says at any time which events
	// have been taken from the queue and not been answered: what makes the
	// group survive this process. The file stays the caller's and is needed
	// until the end of NewGroup; a duplicate of it belongs beside that of the
	// group. nil: no journal.
	Journal *os.File
	// Reservation is what [Reserve] returned for Journal, and the group's from
	// then on. nil: what is still free is reserved when the group is made.
	Reservation *Reservation
}

// inode identifies a file; events carry no name that could be trusted.
type inode struct{ dev, ino uint64 }

type watched struct {
	id       inode
	size     int64
	object   Object
	name     string    // for logs
	expected bool      // by Expect
	retired  time.Time // of Unwatch; zero while watched
}

// A Group is a fanotify group: marks on files, and a queue of the reads that
// wait for them. Its methods are safe for concurrent use, but Watch and Unwatch
// of one file must not run at the same time.
type Group struct {
	f        *os.File
	o        Options
	mark     func(f *os.File, flags uint) error  // fanotify_mark; tests without a kernel replace it
	respond  func(fd int32, answer uint32) error // writes an answer; the same
	journal  *journal                            // nil: none
	reserved *Reservation                        // numbers of what is in left and being answered
	left     []leftover                          // of another process; taken by the first Serve
	pid      int32
	serving  atomic.Bool
	ownRead  sync.Once
	leaving  context.Context // ends with Leave
	leave    context.CancelFunc
	logLimit *rate.Limiter
	count    counters

	mu    sync.RWMutex // guards files
	files map[inode]watched
}

// NewGroup makes a group without marks. It needs CAP_SYS_ADMIN in the initial
// user namespace. The error is a *kernel.UnsupportedError when the kernel cannot
// do it.
func NewGroup(o Options) (*Group, error) {
	fd, err := unix.FanotifyInit(initFlags, eventFlags)
	if err != nil {
		return nil, initError(err)
	}
	return newGroup(os.NewFile(uintptr(fd), "fanotify"), o).begin((*Group).startAfresh)
}

// NewGroupFromFile makes a Group of f, a descriptor that another process made
// with [NewGroup] and handed over, and owns f and o.Reservation from then on, also
// with an error. The marks are still there, but no file is known: every event is
// denied until its file has been passed to Watch or Expect.
//
// With the other process's journal, what it took and did not answer is answered by
// Serve; see [Group.Serve]. Without one, answer that with [Group.DenyPending], before
// Serve. The other process must be dead, or must have ended Serve for good.
func NewGroupFromFile(f *os.File, o Options) (*Group, error) {
	return NewFakeGroup(f, nil, o)
}

// NewFakeGroup is [NewGroupFromFile] with another fanotify_mark(2) for inode marks,
// which gets FAN_MARK_ADD or FAN_MARK_REMOVE: for package fanotifytest. nil: the
// kernel's own.
func NewFakeGroup(f *os.File, mark func(f *os.File, flags uint) error, o Options) (*Group, error) {
	g := newGroup(f, o)
	if mark != nil {
		g.mark = mark
	}
	return g.begin((*Group).takeOver)
}

func newGroup(f *os.File, o Options) *Group {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.MaxInFlight <= 0 {
		o.MaxInFlight = 1024
	}
	if o.Deadline <= 0 {
		o.Deadline = time.Minute
	}
	g := &Group{
		f: f, o: o, pid: int32(os.Getpid()), files: make(map[inode]watched),
		logLimit: rate.NewLimiter(1, 20), reserved: o.Reservation,
	}
	if g.reserved == nil {
		g.reserved = &Reservation{}
	}
	g.leaving, g.leave = context.WithCancel(context.Background())
	g.mark, g.respond = g.kernelMark, g.write
	return g
}

// begin completes a new group: inherit is what it does with its journal. An error
// closes it.
func (g *Group) begin(inherit func(*Group) error) (_ *Group, err error) {
	if err := g.f.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("use %s as a fanotify group: want a descriptor in non-blocking mode: %w", g.f.Name(), err), g.Close())
	}
	if g.o.Journal == nil {
		return g, nil
	}
	if g.journal, err = openJournal(g.o.Journal); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	if err := inherit(g); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	return g, nil
}

// Watch marks f's file and answers its events by o. f must have been opened
// before the file had a mark, or using it makes this process wait for itself;
// it may be closed after the call. Mounts and other readers must open the file
// after the call, or they raise no events and read holes as zeros.
//
// Watching a file again with the same object is allowed and renews the mark;
// another object is an error unless the file has been unwatched. The error is a
// *kernel.UnsupportedError when f's file system or the kernel has no pre-access
// events.
func (g *Group) Watch(f *os.File, o Object) error {
	w, err := fileOf(f, o)
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.Name(), err)
	}
	// Known first, marked second: an event may come before the mark call returns.
	old, known, err := g.add(w)
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.Name(), err)
	}
	if err := g.mark(f, unix.FAN_MARK_ADD); err != nil {
		g.restore(w.id, old, known)
		return fmt.Errorf("watch %s: %w", f.Name(), markError(err))
	}
	return nil
}

// Expect answers the events of f's file by o, like Watch, but makes no mark: the file
// has one from the process that had the group before. f may be any descriptor of it,
// and may be closed after the call. A later Watch of the file, or another Expect, may
// name another object, which takes this one's place; calls of this one that are
// under way go on. So a file can have an object that waits for what it does not
// know yet.
//
// All files with marks must be known before Serve, by Watch or Expect: an event of
// another one is denied, and one that was left with its file unknown is allowed when
// all the known files have its range.
func (g *Group) Expect(f *os.File, o Object) error {
	w, err := fileOf(f, o)
	if err == nil {
		w.expected = true
		_, _, err = g.add(w)
	}
	if err != nil {
		return fmt.Errorf("expect events of %s: %w", f.Name(), err)
	}
	return nil
}

func (g *Group) add(w watched) (old watched, known bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.forget()
	old, known = g.files[w.id]
	if known && old.retired.IsZero() && !old.expected && old.object != w.object {
		return old, known, errors.New("it is watched already, for another object")
	}
	g.files[w.id] = w
	return old, known, nil
}

func (g *Group) restore(id inode, old watched, known bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.files, id)
	if known {
		g.files[id] = old
	}
}

// forget drops files that were unwatched long ago. The caller holds g.mu.
func (g *Group) forget() {
	for id, w := range g.files {
		if !w.retired.IsZero() && time.Since(w.retired) > unwatchGrace {
			delete(g.files, id)
		}
	}
}

// Unwatch removes the mark of f's file: it raises no further events and is as
// fast as any other. Events under way are still answered by its object.
//
// The file must be complete and on disk, or nobody may have it open any more:
// after this call every reader of a hole gets ZEROS WITH SUCCESS. A file that is
// not watched is not an error.
func (g *Group) Unwatch(f *os.File) error {
	w, err := fileOf(f, nil)
	if err != nil {
		return fmt.Errorf("unwatch %s: %w", f.Name(), err)
	}
	if err := g.mark(f, unix.FAN_MARK_REMOVE); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unwatch %s: %w", f.Name(), err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.forget()
	if w, ok := g.files[w.id]; ok && w.retired.IsZero() {
		w.retired = time.Now()
		g.files[w.id] = w
	}
	return nil
}

func (g *Group) find(id inode) (watched, bool) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	w, ok := g.files[id]
	return w, ok
}

// all returns what is known, also what was unwatched a moment ago.
func (g *Group) all() []watched {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.Collect(maps.Values(g.files))
}

// write answers one event by its number.
func (g *Group) write(fd int32, answer uint32) error {
	p := encodeResponse(fd, answer)
	_, err := g.f.Write(p[:])
	return err
}

// File returns the group's own descriptor, for handing a duplicate to a process
// that holds it. It belongs to the group: do not close it, nor make it blocking.
func (g *Group) File() *os.File { return g.f }

// Close closes the group's descriptor; a second call does nothing. When it is the
// LAST one and no other process holds a duplicate, the kernel drops all marks
// and lets all waiting and all later readers through: they get ZEROS WITH
// SUCCESS from every hole. Unmount first.
func (g *Group) Close() error {
	err := g.f.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	g.journal.release()
	if err := errors.Join(err, g.reserved.Close()); err != nil {
		return fmt.Errorf("close fanotify group: %w", err)
	}
	return nil
}

// kernelMark changes the inode mark of f's file.
func (g *Group) kernelMark(f *os.File, flags uint) error {
	return control(g.f, func(group int) error {
		return control(f, func(fd int) error {
			return unix.FanotifyMark(group, flags, unix.FAN_PRE_ACCESS, fd, "")
		})
	})
}

// fileOf is what is known of f's file.
func fileOf(f *os.File, o Object) (w watched, err error) {
	err = control(f, func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return errors.New("not a regular file")
		}
		w = watched{id: inode{st.Dev, st.Ino}, size: st.Size, object: o, name: f.Name()}
		return nil
	})
	return w, err
}

// control calls do with f's descriptor while f cannot be closed.
func control(f syscall.Conn, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if c.Control(func(fd uintptr) { err = do(int(fd)) }) != nil {
		return os.ErrClosed // its only reason, which Control calls something else
	}
	return err
}
