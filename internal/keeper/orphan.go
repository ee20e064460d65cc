package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// workerName is what the service manager calls the pidfd of the worker that has the
// entries: one that outlives its keeper has to go before the next has them.
const workerName = prefix + "worker-pidfd"

// orphanTime is how long a worker may take to die of SIGKILL.
const orphanTime = 30 * time.Second

// storeWorker has the worker's pidfd kept, in the place of its predecessor's.
func (m *manager) storeWorker(p *os.Process) {
	if m == nil {
		return
	}
	fd, err := unix.PidfdOpen(p.Pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		m.log.Warn("the service manager does not know the worker", "err", err)
		return
	}
	defer closeAll([]int{fd})
	m.remove(workerName)
	m.storeFD(workerName, fd)
}

// endOrphan kills the worker of a dead keeper, if it lives, and waits for its end. The
// pidfd is closed.
func endOrphan(ctx context.Context, pidfd int, log *slog.Logger) error {
	err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	process := os.NewFile(uintptr(pidfd), workerName)
	defer process.Close()
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err == nil {
		log.Warn("the last worker has lost its keeper and is killed; the next goes on with what it had")
		err = awaitEnd(ctx, process)
	}
	if err != nil {
		return fmt.Errorf("end the worker of the last keeper: %w; see whether it waits for a disk, and start again", err)
	}
	return nil
}

// awaitEnd waits for the end of a process, whose pidfd does not block.
func awaitEnd(ctx context.Context, process *os.File) error {
	raw, err := process.SyscallConn()
	if err == nil {
		err = process.SetReadDeadline(time.Now().Add(orphanTime))
	}
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		process.SetReadDeadline(past()) // it fails only when nobody waits any more
	})
	defer stop()
	return raw.Read(func(fd uintptr) bool { // a pidfd is readable once its process has ended
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && err != unix.EINTR
	})
}
