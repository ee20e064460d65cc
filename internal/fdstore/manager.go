package fdstore

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// managerTime is how long a message may wait for a service manager that is busy.
const managerTime = time.Second

// A Manager is the service manager that started this process (sd_notify(3)). Its methods are
// safe for concurrent use; the nil one does nothing.
type Manager struct {
	mu   sync.Mutex // one message at a time, each with its own deadline
	conn *net.UnixConn
}

// Dial connects to the service manager; nil if there is none.
func Dial() (*Manager, error) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil, nil
	}
	if rest, abstract := strings.CutPrefix(socket, "@"); abstract {
		socket = "\x00" + rest
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("connect to the service manager at NOTIFY_SOCKET: %w", err)
	}
	return &Manager{conn: conn}, nil
}

// Notify tells a state.
func (m *Manager) Notify(state string) error {
	if m == nil {
		return nil
	}
	if err := m.send(state, nil); err != nil {
		return fmt.Errorf("tell the service manager %s: %w", state, err)
	}
	return nil
}

// Close ends the connection.
func (m *Manager) Close() error {
	if m == nil {
		return nil
	}
	return m.conn.Close()
}

func (m *Manager) store(name string, fd int) error {
	return m.send("FDSTORE=1\nFDNAME="+name+"\nFDPOLL=0\n", unix.UnixRights(fd))
}

func (m *Manager) storeConn(name string, c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) { serr = m.store(name, int(fd)) })
	return errors.Join(err, serr)
}

func (m *Manager) remove(name string) error {
	return m.send("FDSTOREREMOVE=1\nFDNAME="+name+"\n", nil)
}

func (m *Manager) send(text string, oob []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return send(m.conn, text, oob)
}

// send sends a message; net has nothing that does so on a connected socket.
func send(c *net.UnixConn, text string, oob []byte) error {
	if err := c.SetWriteDeadline(time.Now().Add(managerTime)); err != nil {
		return err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), []byte(text), oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		return !errors.Is(serr, unix.EAGAIN)
	})
	if err != nil { // the deadline: it never was sent
		return err
	}
	return serr
}

// sendFile sends a message with f.
func sendFile(c *net.UnixConn, text string, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) { serr = send(c, text, unix.UnixRights(int(fd))) })
	return errors.Join(err, serr)
}
