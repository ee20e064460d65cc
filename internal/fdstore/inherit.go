package fdstore

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// firstFD is the first descriptor that a service manager passes (sd_listen_fds(3)).
const firstFD = 3

// Inherited is what a service manager passed to this process: sockets of containerd's calls,
// and what an earlier store has left. It is for one goroutine; the nil one is empty.
type Inherited struct {
	files []inherited
}

type inherited struct {
	name string
	fd   int // -1: somebody has it
}

// Inherit takes what the service manager passed; nil if nothing. Call it once, before
// anything else is opened. The variables that tell of it are meant for this process alone
// and are taken away.
func Inherit() (*Inherited, error) {
	pid, number, list := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(v); err != nil {
			return nil, err
		}
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	count, err := strconv.Atoi(number)
	if err != nil || count < 0 || count > 2*maxFiles {
		return nil, fmt.Errorf("take over descriptors: LISTEN_FDS is %.40q, want their number", number)
	}
	names := append(strings.Split(list, ":"), make([]string, count)...)
	in := &Inherited{}
	for i, name := range names[:count] {
		fd := firstFD + i
		unix.CloseOnExec(fd)
		in.files = append(in.files, inherited{name, fd})
	}
	return in, nil
}

// Listener returns the socket that listens at a path (systemd.socket(5)), nil if none does.
func (in *Inherited) Listener(path string) (net.Listener, error) {
	f := in.at(path, unix.SOCK_STREAM)
	if f == nil {
		return nil, nil
	}
	l, err := net.FileListener(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("take over the socket %s: %w", path, err)
	}
	return l, nil
}

// socket returns the socket of an earlier store, nil if there is none.
func (in *Inherited) socket(path string) (*net.UnixConn, error) {
	f := in.at(path, unix.SOCK_DGRAM)
	if f == nil {
		return nil, nil
	}
	c, err := net.FilePacketConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("it is no unix socket"), c.Close())
	}
	return conn, nil
}

// at takes the socket of a kind that is bound to a path. One whose path is another's by now
// does not count.
func (in *Inherited) at(path string, kind int) *os.File {
	if in == nil {
		return nil
	}
	for i, f := range in.files {
		if f.fd < 0 || !isSocket(f.fd, path, kind) {
			continue
		}
		in.files[i].fd = -1
		if st, err := os.Lstat(path); err != nil || st.Mode()&os.ModeSocket == 0 {
			unix.Close(f.fd) // nobody finds it any more
			continue
		}
		return os.NewFile(uintptr(f.fd), path)
	}
	return nil
}

func isSocket(fd int, path string, kind int) bool {
	t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || t != kind {
		return false
	}
	name, err := unix.Getsockname(fd)
	bound, ok := name.(*unix.SockaddrUnix)
	return err == nil && ok && bound.Name == path
}

// rest takes what nobody has taken.
func (in *Inherited) rest() iter.Seq2[string, int] {
	return func(yield func(string, int) bool) {
		for in != nil && len(in.files) > 0 {
			f := in.files[0]
			in.files = in.files[1:]
			if f.fd < 0 {
				continue
			}
			if !yield(f.name, f.fd) {
				return
			}
		}
	}
}

// Close lets go of what nobody has taken.
func (in *Inherited) Close() {
	for _, fd := range in.rest() {
		unix.Close(fd)
	}
}
