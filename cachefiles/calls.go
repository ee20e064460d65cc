package cachefiles

import (
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Calls are the system calls on the device and on the files of its objects, by
// descriptor. They are here for package cachefilestest, which has others; a
// [Device] of [Open] or [NewDevice] calls the kernel. Errors are errnos. They
// are called from several goroutines and never wait for an answer of ours.
type Calls interface {
	// Read is read(2) of one message from the device; EAGAIN: none is pending.
	Read(device int, p []byte) (int, error)
	// Culling is poll(2) for POLLOUT: the kernel wants something culled.
	Culling(device int) bool
	// Command is write(2) of one command.
	Command(device int, command string) error
	// CommandIn is Command by a task that works in a directory, given relative to
	// the cache root, which cull and inuse act in.
	CommandIn(device int, root, dir, command string) error
	// Complete is the ioctl that ends READ id.
	Complete(object int, id uint32) error
	// WriteAt is pwrite(2), Seek is lseek(2).
	WriteAt(object int, p []byte, off int64) (int, error)
	Seek(object int, off int64, whence int) (int64, error)
}

// kernelCalls are the kernel's.
type kernelCalls struct{}

func (kernelCalls) Read(device int, p []byte) (int, error) {
	n, err := unix.Read(device, p)
	if n == 0 && err == nil {
		return 0, unix.EAGAIN // the driver's way to say so (daemon.c, cachefiles_daemon_read, 6.1)
	}
	return n, err
}

func (kernelCalls) Culling(device int) bool {
	fds := []unix.PollFd{{Fd: int32(device), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLOUT != 0
}

func (kernelCalls) Command(device int, command string) error {
	_, err := unix.Write(device, []byte(command))
	return err
}

// CommandIn uses a thread of its own, because the working directory belongs to
// all threads of a Go program. The thread is never unlocked and so ends with its
// goroutine.
func (c kernelCalls) CommandIn(device int, root, dir, command string) error {
	fd, err := openBelow(root, dir)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Fchdir(fd)
		}
		if err == nil {
			err = c.Command(device, command)
		}
		done <- err
	}()
	return <-done
}

// openBelow opens directory dir below root without following a link.
func openBelow(root, dir string) (int, error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	fd, err := unix.Open(root, flags, 0)
	if err != nil {
		return -1, err
	}
	for name := range strings.SplitSeq(dir, "/") {
		next, err := unix.Openat(fd, name, flags|unix.O_NOFOLLOW, 0)
		_ = unix.Close(fd) // of a path only
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

func (kernelCalls) Complete(object int, id uint32) error {
	return unix.IoctlSetInt(object, iocReadComplete, int(id))
}

func (kernelCalls) WriteAt(object int, p []byte, off int64) (int, error) {
	return unix.Pwrite(object, p, off)
}

func (kernelCalls) Seek(object int, off int64, whence int) (int64, error) {
	return unix.Seek(object, off, whence)
}

// control calls do with f's descriptor while f cannot be closed.
func control(f syscall.Conn, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if c.Control(func(fd uintptr) { err = do(int(fd)) }) != nil {
		return os.ErrClosed // its only reason, which Control calls something else
	}
	return err
}
