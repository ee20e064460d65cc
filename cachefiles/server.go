package cachefiles

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

const (
	// errorPause slows the loop down when the kernel could not hand over a request
	// for lack of something that a moment may bring back.
	errorPause = 10 * time.Millisecond
	// cullInterval is how often the device is asked whether it wants culling.
	cullInterval = time.Second
)

var (
	errEnded    = errors.New("the server has ended")
	errClosed   = errors.New("the kernel has closed the object")
	errReplaced = errors.New("the kernel has given the object's number to another")
	errRefused  = errors.New("the object was not accepted")
	errQueue    = errors.New("too many reads wait")
)

// A Server answers the requests of one device.
type Server struct {
	d        *Device
	h        Handler
	o        Options
	serving  atomic.Bool
	logLimit *rate.Limiter
	count    counters
}

// NewServer makes a server of a device that is bound. It does nothing before
// Serve.
func NewServer(d *Device, h Handler, o Options) *Server {
	o.setDefaults()
	return &Server{d: d, h: h, o: o, logLimit: rate.NewLimiter(1, 20)}
}

// Serve answers requests until ctx is done and returns nil then, after every
// request that it read was answered (or left, see Options.Handover), every object
// closed and every file closed. What the kernel asks after that waits until the
// device is served again, or closed by all who have it.
//
// A device is served by one server, once at a time. Any error but the misuse of
// that means that the cache is dead, and so are its mounts.
func (s *Server) Serve(ctx context.Context) error {
	if !s.serving.CompareAndSwap(false, true) {
		return errors.New("serve cachefiles device: it is being served already")
	}
	defer s.serving.Store(false)
	if s.d.dir == "" {
		return errors.New("serve cachefiles device: bind it first")
	}
	conn, err := s.d.f.SyscallConn()
	if err != nil {
		return fmt.Errorf("serve cachefiles device: %w", err)
	}
	r := newSession(ctx, s, conn)
	err = r.loop(ctx)
	r.end(err == nil)
	if err != nil {
		return fmt.Errorf("serve cachefiles device: %w", deadHint(err))
	}
	return nil
}

// A session is one run of Serve. Its reader is the goroutine of Serve: it reads
// messages and never waits for anything else, so that a CLOSE is dealt with
// however many READs wait: a remount hangs until its CLOSE was read and the file
// closed.
type session struct {
	*Server
	conn     syscall.RawConn
	buf      [largestMessage]byte
	n        int // results of tryRead
	err      error
	culledAt time.Time // when Culling was asked last

	base     context.Context // of everything under way; ends Grace after Serve's
	abort    context.CancelCauseFunc
	work     sync.WaitGroup // goroutines
	requests sync.WaitGroup // OPENs and READs without an answer

	mu       sync.Mutex // guards what follows, and the objects' fields that say so
	objects  map[uint32]*object
	refusals map[Key]refusal
	queue    queue
	left     bool // answers are left to a successor
}

func newSession(ctx context.Context, s *Server, conn syscall.RawConn) *session {
	r := &session{Server: s, conn: conn, objects: make(map[uint32]*object), refusals: make(map[Key]refusal)}
	r.base, r.abort = context.WithCancelCause(context.WithoutCancel(ctx))
	return r
}

// loop reads and dispatches messages until ctx is done.
func (r *session) loop(ctx context.Context) error {
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(expired)
		_ = r.d.f.SetReadDeadline(time.Unix(1, 0)) // fails only when the device is closed, which ends the loop too
	})
	defer func() {
		if !stop() {
			<-expired
		}
		_ = r.d.f.SetReadDeadline(time.Time{}) // the device may be served again
	}()
	for ctx.Err() == nil {
		n, err := r.read()
		switch {
		case err == nil:
			r.dispatch(r.buf[:n], time.Now())
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case !oneRequest(err):
			return fmt.Errorf("read a request: %w", err)
		default:
			r.count.readFails.Add(1)
			r.logFailure("the kernel failed a request when it was read (see RLIMIT_NOFILE)", nil, err)
			select {
			case <-time.After(errorPause):
			case <-ctx.Done():
			}
		}
	}
	return nil
}

// oneRequest says that an error of read(2) is about one request, which the
// kernel has failed, and not about the device: no descriptor, no memory, or
// (EEXIST) a file of the object that somebody else still has.
func oneRequest(err error) bool {
	for _, errno := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EEXIST, unix.EFAULT, unix.EBUSY} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// read waits for a message and reads it into r.buf.
func (r *session) read() (int, error) {
	if err := r.conn.Read(r.tryRead); errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, err
	} else if err != nil {
		return 0, os.ErrClosed // the only other reason, which Read calls something else
	}
	return r.n, r.err
}

// tryRead reads once; false: nothing is pending. The read of an OPEN installs a
// descriptor that children inherit, so no child may be started before that is
// changed: one that had it would make a remount hang.
func (r *session) tryRead(fd uintptr) bool {
	syscall.ForkLock.RLock()
	r.n, r.err = r.d.calls.Read(int(fd), r.buf[:])
	for r.err == unix.EINTR {
		r.n, r.err = r.d.calls.Read(int(fd), r.buf[:])
	}
	if r.err == nil {
		if file := openFD(r.buf[:r.n]); file >= 0 {
			unix.CloseOnExec(file)
		}
	}
	syscall.ForkLock.RUnlock()
	if r.err != unix.EAGAIN {
		return true
	}
	if now := time.Now(); now.Sub(r.culledAt) > cullInterval {
		r.culledAt = now
		if r.d.calls.Culling(int(fd)) {
			r.count.pollCull.Add(1)
		}
	}
	return false
}

// dispatch hands one message on.
func (r *session) dispatch(p []byte, start time.Time) {
	m, err := parse(p)
	r.count.requests.Add(1)
	switch {
	case err != nil:
		r.malformed(m, err)
	case m.op == opOpen:
		r.handleOpen(m, start)
	case m.op == opClose:
		r.handleClose(m)
	default:
		r.handleRead(m, start)
	}
}

// malformed fails what can be failed. Nothing like that comes from a kernel we
// know.
func (r *session) malformed(m message, why error) {
	r.count.malformed.Add(1)
	r.logFailure("a request that cannot be decoded", nil, fmt.Errorf("message %d, opcode %d, object %d: %w", m.id, m.op, m.object, why))
	switch {
	case errors.Is(why, errTruncated):
	case m.op == opOpen:
		r.command(encodeCopen(m.id, -int64(unix.EINVAL)))
		if m.fd >= 0 {
			_ = unix.Close(m.fd)
		}
	case m.op == opRead:
		r.mu.Lock()
		o := r.objects[m.object]
		r.mu.Unlock()
		if o != nil {
			r.complete(o, m.id)
		}
	}
}

// end brings everything under way to its end: it waits for Grace, when the cache
// is alive, then answers or leaves the rest, and closes all objects.
func (r *session) end(alive bool) {
	idle := make(chan struct{})
	go func() {
		r.requests.Wait()
		close(idle)
	}()
	if alive {
		timer := time.NewTimer(r.o.Grace)
		defer timer.Stop()
		select {
		case <-idle:
		case <-timer.C:
		}
	}
	r.mu.Lock()
	r.left = r.o.Handover
	queued := r.queue.flush()
	objects := make([]*object, 0, len(r.objects))
	for _, o := range r.objects {
		objects = append(objects, o)
	}
	r.mu.Unlock()
	r.abort(errEnded) // answers, or leaves, what is under way
	for _, q := range queued {
		r.answer(q, errEnded)
	}
	for _, o := range objects {
		r.release(o, errEnded)
	}
	r.work.Wait()
	<-idle
}

// command writes an answer to an OPEN; it reports whether the kernel took it.
func (r *session) command(c string) bool {
	err := r.d.command(c)
	r.answered(err)
	return err == nil
}

// complete ends READ id of o.
func (r *session) complete(o *object, id uint32) { r.answered(o.file.complete(id)) }

// answered counts an answer that the kernel did not take. EINVAL says that it
// does not wait for it any more, because the reader or the mount was killed.
func (r *session) answered(err error) {
	switch {
	case err == nil:
	case errors.Is(err, unix.EINVAL):
		r.count.lost.Add(1)
		r.o.Logger.Debug("the kernel did not wait for an answer any more", "err", err)
	default:
		r.count.lost.Add(1)
		r.logFailure("answer the kernel", nil, err)
	}
}

func (r *session) observe(op Op, start time.Time, err error) {
	if r.o.Observer != nil {
		r.o.Observer(op, time.Since(start), err)
	}
}

// logFailure is limited: a program that retries a failing read would fill the log.
func (r *session) logFailure(what string, o *object, err error, args ...any) {
	if !r.logLimit.Allow() {
		return
	}
	if o != nil {
		args = append(args, "domain", o.key.Volume, "blob", o.key.Cookie, "object", o.id)
	}
	r.o.Logger.Error(what, append(args, "err", err)...)
}
