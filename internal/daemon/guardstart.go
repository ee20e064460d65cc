package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guardStartTime is how long a guard may take to be there.
const guardStartTime = 10 * time.Second

// startGuard starts the guard process for the group and the cache directory. With apart,
// which is below systemd, it is in a scope of its own: who kills the service with all that
// belongs to it leaves the guard, which answers when systemd lets go of what it keeps.
func startGuard(group, lock *os.File, cache string, apart bool, log *slog.Logger) (*guard, error) {
	if apart {
		g, err := launchGuard(scopedGuard(cache), group, lock)
		if err == nil {
			return g, nil
		}
		log.Warn("the guard is a part of the service: if all of that is killed and then stopped, holes read as zeros", "err", err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{guardName, cache}
	return launchGuard(cmd, group, lock)
}

// scopedGuard is the command of a guard that systemd takes out of our cgroup. The scope is
// left alone when the machine goes down: the guard goes with the last processes.
func scopedGuard(cache string) *exec.Cmd {
	return exec.Command("systemd-run", "--scope", "--quiet", "--collect",
		"--unit="+guardName+"-"+strconv.FormatInt(time.Now().UnixNano(), 36), "--description=Guard of the images of erofsd",
		"--property=DefaultDependencies=no", "--property=KillSignal=SIGKILL",
		"--", fmt.Sprintf("/proc/%d/exe", os.Getpid()), guardName, cache)
}

// launchGuard runs cmd, and returns when it is the guard.
func launchGuard(cmd *exec.Cmd, group, lock *os.File) (*guard, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", guardName, err)
	}
	defer r.Close()
	ready, theirs, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", guardName, err), w.Close())
	}
	defer ready.Close()
	cmd.ExtraFiles = []*os.File{group, r, lock, theirs}
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal to the daemon's group is not for it
	err = cmd.Start()
	theirs.Close() // nothing was written to it
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", guardName, err), w.Close())
	}
	err = ready.SetReadDeadline(time.Now().Add(guardStartTime))
	if err == nil {
		_, err = ready.Read(make([]byte, 1))
	}
	var fd int
	if err == nil {
		fd, err = unix.PidfdOpen(cmd.Process.Pid, unix.PIDFD_NONBLOCK)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %s: %w", guardName, cmd.Path, err), w.Close(), cmd.Process.Kill(), cmd.Wait())
	}
	return &guard{w, os.NewFile(uintptr(fd), guardName), cmd}, nil
}
