package smoke

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A supervisor keeps what a daemon needs to be replaced: bytes and exactly one descriptor
// (nydus-snapshotter, pkg/supervisor; nydusd-surface 2.8). Who connects while it fetches
// gives; who connects while it gives gets.
type supervisor struct {
	socket string
	data   []byte
	fd     int // -1: none
}

// newSupervisor makes one, whose descriptor is closed with the test.
func newSupervisor(t *testing.T, m *machine) *supervisor {
	s := &supervisor{socket: filepath.Join(m.dir, "supervisor.sock"), fd: -1}
	t.Cleanup(func() { s.drop() })
	return s
}

func (s *supervisor) drop() {
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
	s.data, s.fd = nil, -1
}

// errNobody says that the daemon did not connect.
var errNobody = errors.New("nobody connected to the supervisor")

// exchange has trigger make the daemon connect, and serves that connection. The daemon may
// be done with it before it is accepted; so we come last ourselves, to end the wait for one
// that does not come.
func (s *supervisor) exchange(t *testing.T, trigger func(), serve func(*net.UnixConn) error) error {
	t.Helper()
	os.Remove(s.socket) // of the last exchange
	place := &net.UnixAddr{Name: s.socket, Net: "unix"}
	l, err := net.ListenUnix("unix", place)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	us := &net.UnixAddr{Name: "@" + s.socket, Net: "unix"} // a name without a file
	served := make(chan error, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err == nil {
			defer c.Close()
			if c.RemoteAddr().String() == us.Name {
				err = errNobody
			} else {
				_ = c.SetDeadline(time.Now().Add(patience)) // a connection of this kind has deadlines
				err = serve(c)
			}
		}
		served <- err
	}()
	trigger()
	last, err := net.DialUnix("unix", us, place)
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	return <-served
}

// attend gives what it has to the first daemon that connects, and fetches from all others,
// until the test ends.
func (s *supervisor) attend(t *testing.T) {
	os.Remove(s.socket) // of the last exchange
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for serve := s.send; ; serve = s.receive {
			c, err := l.AcceptUnix()
			if err != nil {
				return // it is closed
			}
			_ = c.SetDeadline(time.Now().Add(patience)) // a connection of this kind has deadlines
			if err := serve(c); err != nil {
				t.Log(err)
			}
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
}

// fetch gets the state that trigger makes a daemon give.
func (s *supervisor) fetch(t *testing.T, trigger func()) error {
	t.Helper()
	return s.exchange(t, trigger, s.receive)
}

func (s *supervisor) receive(c *net.UnixConn) error {
	p, oob := make([]byte, 32<<10), make([]byte, unix.CmsgSpace(16*4))
	n, oobn, _, _, err := c.ReadMsgUnix(p, oob)
	if err != nil {
		return err
	}
	fds, err := received(oob[:oobn])
	if err != nil {
		return err
	}
	if len(fds) != 1 {
		closeAll(fds)
		return fmt.Errorf("%d control file descriptors came, want one", len(fds))
	}
	rest, err := io.ReadAll(c)
	if err != nil {
		closeAll(fds)
		return err
	}
	s.drop()
	s.data, s.fd = append(p[:n:n], rest...), fds[0]
	return nil
}

// give sends the state to the daemon that trigger makes take over.
func (s *supervisor) give(t *testing.T, trigger func()) error {
	t.Helper()
	return s.exchange(t, trigger, s.send)
}

func (s *supervisor) send(c *net.UnixConn) error {
	var rights []byte
	if s.fd >= 0 {
		rights = unix.UnixRights(s.fd)
	}
	n, _, err := c.WriteMsgUnix(s.data[:min(len(s.data), 32<<10)], rights, nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(c, bytes.NewReader(s.data[n:]))
	return err
}

func received(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		some, err := unix.ParseUnixRights(&m)
		if err != nil {
			closeAll(fds)
			return nil, err
		}
		fds = append(fds, some...)
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
