package testenv

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// managerTime is how long Manager waits for what must come.
const managerTime = time.Minute

// A Manager is a service manager that keeps descriptors as systemd does (sd_notify(3)).
type Manager struct {
	Path string // of its socket, NOTIFY_SOCKET

	conn *net.UnixConn
	done chan struct{}

	mu     sync.Mutex // guards what follows
	kept   []managed
	states map[string]int
}

type managed struct {
	name string
	file *os.File
}

// NewManager returns one that ends with t.
func NewManager(t testing.TB) *Manager {
	t.Helper()
	dir, err := os.MkdirTemp("", "manager-*") // short
	if err != nil {
		t.Fatal(err)
	}
	m := &Manager{Path: filepath.Join(dir, "notify"), done: make(chan struct{}), states: map[string]int{}}
	if m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.Path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	go m.read(t)
	t.Cleanup(func() {
		m.conn.Close()
		<-m.done
		for _, k := range m.kept {
			k.file.Close()
		}
		os.RemoveAll(dir)
	})
	return m
}

func (m *Manager) read(t testing.TB) {
	defer close(m.done)
	p, oob := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oobn, _, _, err := m.conn.ReadMsgUnix(p, oob)
		if err != nil {
			return // closed
		}
		var fds []int
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		for i := range messages {
			var some []int
			some, err = unix.ParseUnixRights(&messages[i])
			fds = append(fds, some...)
		}
		if err != nil {
			t.Error(err)
		}
		m.take(string(p[:n]), fds)
	}
}

// take does what a message says.
func (m *Manager) take(text string, fds []int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var name string
	for line := range strings.SplitSeq(text, "\n") {
		if n, ok := strings.CutPrefix(line, "FDNAME="); ok {
			name = n
		} else if line != "" {
			m.states[line]++
		}
	}
	if strings.Contains(text, "FDSTOREREMOVE=1") {
		m.kept = slices.DeleteFunc(m.kept, func(k managed) bool {
			if k.name == name {
				k.file.Close()
			}
			return k.name == name
		})
	}
	for _, fd := range fds {
		if !strings.Contains(text, "FDSTORE=1") || slices.ContainsFunc(m.kept, func(k managed) bool { return k.is(fd) }) {
			unix.Close(fd) // an open file only once
			continue
		}
		m.kept = append(m.kept, managed{name, os.NewFile(uintptr(fd), name)})
	}
}

// is reports whether fd is the same open file.
func (k managed) is(fd int) bool {
	pid := uintptr(os.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, 0, k.file.Fd(), uintptr(fd), 0)
	return errno == 0 && order == 0
}

// Keep has it pass a duplicate of f by a name as well, as it does with sockets.
func (m *Manager) Keep(t testing.TB, name string, f *os.File) {
	t.Helper()
	raw, err := f.SyscallConn() // Fd would have a listener block, also for those that it is passed to
	if err != nil {
		t.Fatal(err)
	}
	var fd int
	var derr error
	err = raw.Control(func(old uintptr) { fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, derr); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kept = append(m.kept, managed{name, os.NewFile(uintptr(fd), name)})
}

// Drop has it let go of everything, as when a service is stopped.
func (m *Manager) Drop(t testing.TB) {
	t.Helper()
	m.hear(t)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range m.kept {
		k.file.Close()
	}
	m.kept = nil
}

// Heard is how often a line was said.
func (m *Manager) Heard(line string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.states[line]
}

// Kept are the names of what is kept, in order, once all that was sent has been taken.
func (m *Manager) Kept(t testing.TB) (names []string) {
	t.Helper()
	m.hear(t)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range m.kept {
		names = append(names, k.name)
	}
	return names
}

// hear waits until everything that was sent has been taken.
func (m *Manager) hear(t testing.TB) {
	t.Helper()
	c, err := net.Dial("unixgram", m.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mark := fmt.Sprintf("mark %d", time.Now().UnixNano())
	if _, err := c.Write([]byte(mark)); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(managerTime); m.Heard(mark) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the service manager hears nothing")
		}
	}
}

// Await waits until a line was said so often.
func (m *Manager) Await(t testing.TB, line string, times int) {
	t.Helper()
	for end := time.Now().Add(managerTime); m.Heard(line) < times; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the service manager has heard %q %d times, want %d", line, m.Heard(line), times)
		}
	}
}

// Give has cmd started with what is kept, which is duplicated: call close after the start.
func (m *Manager) Give(t testing.TB, cmd *exec.Cmd) (close func()) {
	t.Helper()
	m.hear(t)
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for _, k := range m.kept {
		fd, err := unix.FcntlInt(k.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		names, cmd.ExtraFiles = append(names, k.name), append(cmd.ExtraFiles, os.NewFile(uintptr(fd), k.name))
	}
	cmd.Env = append(cmd.Environ(), "NOTIFY_SOCKET="+m.Path, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	return func() {
		var errs []error
		for _, f := range cmd.ExtraFiles {
			errs = append(errs, f.Close())
		}
		if err := errors.Join(errs...); err != nil {
			t.Error(err)
		}
	}
}
