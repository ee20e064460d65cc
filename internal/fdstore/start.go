package fdstore

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// starterName is argv[0] of a process that becomes a service: only it knows the number that
// LISTEN_PID must have. The descriptor follows on which it waits until the process is noted
// as the main one, and the command.
const starterName = "erofsd-starter"

// IsStarter reports whether this process was started to become a service. Ask before
// anything else, and then call Become.
func IsStarter(args []string) bool { return len(args) > 3 && args[0] == starterName }

// Become executes the service. It returns only with an error.
func Become(args []string) error {
	fd, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	gate := os.NewFile(uintptr(fd), "gate")
	_, err = gate.Read(make([]byte, 1))
	if err = errors.Join(err, gate.Close(), os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))); err != nil {
		return fmt.Errorf("wait for whoever starts %s: %w", args[2], err)
	}
	return fmt.Errorf("execute %s: %w", args[2], syscall.Exec(args[2], args[3:], os.Environ()))
}

// Start starts cmd as the service, with all that is kept; its environment must be without
// another service manager. This program's main must begin with IsStarter. The service is
// asked for signs of life within watchdog. The process is noted as the main one before it
// can store anything. With an error nothing runs.
func (s *Store) Start(cmd *exec.Cmd, watchdog time.Duration) error {
	names, files, err := s.duplicates()
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return err
	}
	theirs, gate, err := os.Pipe()
	if err != nil {
		return err
	}
	defer theirs.Close()
	defer gate.Close()
	pidfd := -1
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.PidFD = &pidfd
	cmd.Args = append([]string{starterName, strconv.Itoa(firstFD + len(files)), cmd.Path}, cmd.Args...)
	cmd.Path = "/proc/self/exe"
	cmd.Env = append(cmd.Environ(), "NOTIFY_SOCKET="+s.path, fmt.Sprintf("WATCHDOG_USEC=%d", watchdog.Microseconds()),
		fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.ExtraFiles = append(files, theirs)
	if err := cmd.Start(); err != nil {
		return err
	}
	if pidfd < 0 {
		err = errors.New("the kernel has no pidfd for the service, which Linux 5.4 has")
	} else {
		err = s.SetMain(pidfd)
		unix.Close(pidfd)
	}
	if err == nil {
		_, err = gate.Write([]byte{1})
	}
	if err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	return nil
}

// duplicates returns all that is kept for the service.
func (s *Store) duplicates() (names []string, files []*os.File, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(s.fds)) {
		if !isService(name) {
			continue
		}
		fd, err := unix.FcntlInt(uintptr(s.fds[name]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, files, fmt.Errorf("hand over %s: %w", name, err)
		}
		names, files = append(names, name), append(files, os.NewFile(uintptr(fd), name))
	}
	return names, files, nil
}
