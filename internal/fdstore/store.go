package fdstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of what a service may have kept. The names come back in one variable, which the
// kernel limits to 32 pages (execve(2)).
const (
	maxFiles = 1 << 16
	maxNames = 120 << 10
	maxName  = 255
)

// Names of what is kept for the process that has the store, and not for the service.
const (
	socketName = "store-socket"
	mainName   = "store-main" // pidfd of the service's main process
)

// Options of a Store.
type Options struct {
	Path      string     // of the socket, below a directory that only root may enter
	Inherited *Inherited // what an earlier store has left; nil: nothing
	Manager   *Manager   // what keeps it for the next store; nil: nobody
	Logger    *slog.Logger
}

// A Store keeps descriptors. Its methods are safe for concurrent use.
type Store struct {
	path    string
	log     *slog.Logger
	manager *Manager
	conn    *net.UnixConn
	done    chan struct{} // closed when nobody reads any more

	mu    sync.Mutex     // guards what follows
	fds   map[string]int // by name
	names int            // bytes of the names
	full  bool           // it was said
	beat  time.Time      // of the last sign of life
}

// Open makes a store, with the socket. Only one may have a path at a time.
func Open(o Options) (*Store, error) {
	s := &Store{path: o.Path, log: o.Logger, manager: o.Manager, done: make(chan struct{}), fds: map[string]int{}}
	conn, err := o.Inherited.socket(o.Path)
	if err == nil && conn == nil {
		conn, err = listen(o.Path)
		if err == nil {
			s.pass(socketName, func() error {
				return errors.Join(s.manager.remove(socketName), s.manager.storeConn(socketName, conn))
			})
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open the store of descriptors at %s: %w", o.Path, err)
	}
	s.conn = conn
	for name, fd := range o.Inherited.rest() {
		if name == socketName || strings.HasSuffix(name, ".socket") { // systemd.socket(5)
			unix.Close(fd)
			s.log.Warn("a socket that the service manager passed is none of those that are configured", "name", name)
			continue
		}
		s.put(name, fd)
	}
	go s.read()
	return s, nil
}

// listen makes the socket in the place of a dead store's.
func listen(path string) (*net.UnixConn, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// Close ends the store. What it has kept is let go of here; a service manager keeps it.
func (s *Store) Close() error {
	err := s.conn.Close()
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, fd := range s.fds {
		err = errors.Join(err, unix.Close(fd))
		delete(s.fds, name)
	}
	return err
}

// Len is the number of descriptors that the service has stored.
func (s *Store) Len() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.fds {
		if isService(name) {
			n++
		}
	}
	return n
}

// Beat is when the service gave its last sign of life; zero when it never did.
func (s *Store) Beat() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.beat
}

// Forget lets go of everything, also in the service manager.
func (s *Store) Forget() {
	s.mu.Lock()
	names := slices.Collect(maps.Keys(s.fds))
	s.mu.Unlock()
	for _, name := range names {
		s.drop(name)
	}
}

// SetMain notes the service's main process. The descriptor stays the caller's.
func (s *Store) SetMain(pidfd int) error {
	fd, err := unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("note the service's main process: %w", err)
	}
	s.drop(mainName)
	s.store(mainName, fd)
	s.mu.Lock()
	s.beat = time.Time{} // another one
	s.mu.Unlock()
	return nil
}

// Main returns the main process that was noted last, by this store or by an earlier one, as
// a pidfd of the caller's own; -1 if there is none.
func (s *Store) Main() (pidfd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, ok := s.fds[mainName]
	if !ok {
		return -1, nil
	}
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

// isService reports whether something is kept for the service.
func isService(name string) bool { return name != mainName && name != socketName }

// store keeps fd, here and in the service manager.
func (s *Store) store(name string, fd int) {
	if s.put(name, fd) {
		s.pass(name, func() error { return s.manager.store(name, fd) })
	}
}

// put keeps fd in the place of another one of that name. It is the store's from now on;
// false when there is no room.
func (s *Store) put(name string, fd int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.fds[name]; ok {
		unix.Close(old)
		s.fds[name] = fd
		return true
	}
	switch {
	case !isName(name):
		s.log.Warn("a service wants a descriptor kept by a name that is none", "name", fmt.Sprintf("%.40q", name))
	case len(s.fds) < maxFiles && s.names+len(name)+1 <= maxNames:
		s.fds[name] = fd
		s.names += len(name) + 1
		return true
	case !s.full:
		s.full = true
		s.log.Error("there is no room for more descriptors of the service; what they are for is lost if it dies", "descriptors", len(s.fds))
	}
	unix.Close(fd)
	return false
}

// isName reports whether sd_notify(3) allows a name.
func isName(name string) bool {
	return name != "" && len(name) <= maxName && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == ':' })
}

// drop lets go of what has a name, here and in the service manager.
func (s *Store) drop(name string) {
	s.mu.Lock()
	fd, ok := s.fds[name]
	if ok {
		unix.Close(fd)
		delete(s.fds, name)
		s.names -= len(name) + 1
	}
	s.mu.Unlock()
	if ok {
		s.pass(name, func() error { return s.manager.remove(name) })
	}
}

// pass tells the service manager, if there is one.
func (s *Store) pass(name string, tell func() error) {
	if s.manager == nil {
		return
	}
	if err := tell(); err != nil {
		s.log.Warn("the service manager was not told what to keep for the next start", "name", name, "err", err)
	}
}

// Sync waits until everything that the service has sent so far is stored.
func (s *Store) Sync(ctx context.Context) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })() // fails when it is closed
	err = barrier(s.path, w)
	w.Close() // nothing was written
	if err == nil {
		_, err = r.Read(make([]byte, 1)) // io.EOF when the other end has been read, and closed
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("wait for the store of descriptors: %w", err)
	}
	return nil
}
