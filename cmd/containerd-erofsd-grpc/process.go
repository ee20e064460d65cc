package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A process is one that need not be our child. Its descriptor stays its own when the number
// becomes another's.
type process struct {
	pid  int      // 0: not known
	file *os.File // pidfd, or a connection that ends with it
}

// openProcess opens a process.
func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &process{pid: pid, file: os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid))}, nil
}

// openListener opens the process that listens at a unix socket, by a connection: nydusd says
// nothing there that it was not asked for, and never closes it while it lives.
func openListener(ctx context.Context, socket string) (*process, error) {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	defer c.Close() // the process has a descriptor of its own
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("connect to %s: it is a %T", socket, c)
	}
	p := &process{}
	if p.file, err = conn.File(); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	err = p.with(func(fd int) error {
		who, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err == nil {
			p.pid = int(who.Pid) // 0 when it is in no namespace that is seen from here
		}
		return err
	})
	if err != nil {
		p.close()
		return nil, fmt.Errorf("ask who listens at %s: %w", socket, err)
	}
	return p, nil
}

// processOf is the process of a pidfd, which is its own from now on.
func processOf(fd int) *process {
	_ = unix.SetNonblock(fd, true) // fails only for what is no descriptor
	return &process{file: os.NewFile(uintptr(fd), "pidfd")}
}

// mainOf opens the first process of the daemon that a worker belongs to: its keeper, which
// was called as it was, or itself.
func mainOf(worker *process) (*process, error) {
	parent, err := parentOf(worker.pid)
	if err != nil {
		return nil, err
	}
	ours, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", worker.pid))
	if err != nil {
		return nil, err
	}
	theirs, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", parent))
	if err != nil || !bytes.Equal(ours, theirs) {
		return openProcess(worker.pid)
	}
	p, err := openProcess(parent)
	if err != nil {
		return nil, err
	}
	if again, err := parentOf(worker.pid); err != nil || again != parent { // the number may be another's
		p.close()
		return nil, errors.Join(errors.New("its keeper has ended this moment"), err)
	}
	return p, nil
}

// parentOf is the parent of a process.
func parentOf(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text[bytes.LastIndexByte(text, ')')+1:]), " ") // after its name, which may be anything
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat has no parent", pid)
	}
	return strconv.Atoi(fields[1])
}

// with calls f with the pidfd.
func (p *process) with(f func(fd int) error) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = raw.Control(func(fd uintptr) { ferr = f(int(fd)) })
	return errors.Join(err, ferr)
}

// kill kills it.
func (p *process) kill() error {
	return p.with(func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
}

// wait returns when the process has ended, or with the error of ctx.
func (p *process) wait(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		_ = p.file.SetReadDeadline(time.Unix(1, 0)) // fails only if it is closed
	})()
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (p *process) close() { p.file.Close() }

// withoutManager is an environment without what a service manager says to us alone.
func withoutManager(environ []string) []string {
	return slices.DeleteFunc(slices.Clone(environ), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		return slices.Contains([]string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}, name)
	})
}
