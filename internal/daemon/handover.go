package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// deviceName is what the service manager calls the device that it keeps for us.
const deviceName = "cachefiles"

// firstListenFD is the first descriptor that a service manager passes (sd_listen_fds(3)).
const firstListenFD = 3

// InheritedDevice returns /dev/cachefiles as an earlier daemon left it with the service
// manager, nil if there is none. The variables that say so are meant for this process
// alone and are taken away.
func InheritedDevice() (*os.File, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(v); err != nil {
			return nil, err
		}
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 {
		return nil, fmt.Errorf("take over descriptors: LISTEN_FDS is %q, want a number", count)
	}
	i := slices.Index(strings.Split(names, ":"), deviceName)
	if i < 0 || i >= n {
		return nil, nil
	}
	syscall.CloseOnExec(firstListenFD + i)
	return os.NewFile(uintptr(firstListenFD+i), deviceName), nil
}

// notify tells the service manager that the daemon serves, and with device has it keep
// that for the next one (sd_notify(3)). Without a service manager it does nothing.
func notify(device *os.File) error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	if rest, abstract := strings.CutPrefix(socket, "@"); abstract {
		socket = "\x00" + rest
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	_, err = c.Write([]byte("READY=1\n"))
	if err == nil && device != nil {
		err = send(c, device)
	}
	if err := errors.Join(err, c.Close()); err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}

// send sends device to be kept.
func send(c *net.UnixConn, device *os.File) error {
	to, err := c.SyscallConn()
	if err != nil {
		return err
	}
	raw, err := device.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		message := []byte("FDSTORE=1\nFDNAME=" + deviceName + "\nFDPOLL=0\n")
		err := to.Write(func(socket uintptr) bool {
			serr = syscall.Sendmsg(int(socket), message, syscall.UnixRights(int(fd)), nil, 0)
			return !errors.Is(serr, syscall.EAGAIN)
		})
		serr = errors.Join(serr, err)
	})
	return errors.Join(err, serr)
}

// duplicate returns another descriptor of what f is.
func duplicate(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var derr error
	err = raw.Control(func(old uintptr) {
		fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(err, derr); err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
