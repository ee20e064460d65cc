package fanotify

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/kernel"
)

const feature = "fanotify pre-access events"

// since is the first kernel with FAN_PRE_ACCESS; for messages only.
var since = kernel.Version{Major: 6, Minor: 14}

// probeTime is how long the probe waits for its own event.
const probeTime = 5 * time.Second

// Supported reports whether files in dir can be served: it marks a scratch file
// there, reads it and answers the event. It needs CAP_SYS_ADMIN in the initial
// user namespace. The error is a *kernel.UnsupportedError that names the one
// missing thing when the kernel or dir's file system cannot do it; any other
// error means that it could not be tried.
func Supported(dir string) error {
	g, err := NewGroup(Options{})
	if err != nil {
		return err
	}
	defer g.Close()
	f, err := os.CreateTemp(dir, ".erofsd-probe-*")
	if err != nil {
		return fmt.Errorf("probe %s: %w", feature, err)
	}
	defer f.Close()
	defer os.Remove(f.Name())
	if err := f.Truncate(probeSize); err != nil {
		return fmt.Errorf("probe %s: %w", feature, err)
	}
	if err := g.mark(f, unix.FAN_MARK_ADD); err != nil {
		return fmt.Errorf("watch a file in %s: %w", dir, markError(err))
	}
	if err := g.probeRead(f); err != nil {
		return fmt.Errorf("probe %s in %s: %w", feature, dir, err)
	}
	return nil
}

const probeSize = 4096

// probeRead reads f's file, which has a mark, through a second descriptor, and
// makes its byte present when the event comes.
func (g *Group) probeRead(f *os.File) error {
	r, err := os.Open(f.Name())
	if err != nil {
		return err
	}
	defer r.Close()
	var got [1]byte
	read := make(chan error, 1)
	go func() {
		_, err := r.ReadAt(got[:], 0)
		read <- err
	}()
	err = g.probeAnswer(f)
	if err != nil {
		err = errors.Join(err, g.Close()) // lets the reader go
	}
	if rerr := <-read; rerr != nil && err == nil {
		err = rerr
	}
	if err == nil && got[0] != 1 {
		err = &kernel.UnsupportedError{Feature: feature, Since: since, Missing: "a kernel that shows readers what was written during the event"}
	}
	return err
}

// probeAnswer waits for the event of a read of f, fills its range and allows it.
func (g *Group) probeAnswer(f *os.File) error {
	if err := g.f.SetReadDeadline(time.Now().Add(probeTime)); err != nil {
		return err
	}
	buf := make([]byte, largestEvent)
	n, err := g.f.Read(buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &kernel.UnsupportedError{Feature: feature, Since: since, Missing: "a kernel that raises them for read(2)"}
	}
	if err != nil {
		return fmt.Errorf("read the event: %w", err)
	}
	e, _, err := parseEvent(buf[:n])
	if e.fd >= 0 {
		defer unix.Close(int(e.fd))
	}
	switch {
	case errors.Is(err, errNoRange):
		return &kernel.UnsupportedError{Feature: feature, Since: since, Missing: "range records in its events"}
	case err != nil:
		return fmt.Errorf("decode the event: %w", err)
	case e.fd < 0:
		return fmt.Errorf("open the event's file: %w", unix.Errno(-e.fd))
	case e.off != 0 || e.n != probeSize:
		return fmt.Errorf("the event of a read of byte 0 asks for %d bytes at %d", e.n, e.off)
	}
	if _, err := f.WriteAt([]byte{1}, 0); err != nil {
		return err
	}
	return g.write(e.fd, allow)
}

// initError explains an errno of fanotify_init(2).
func initError(err error) error {
	e := &kernel.UnsupportedError{Feature: feature, Since: since, Err: err}
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: need CAP_SYS_ADMIN in the initial user namespace (run as root, outside of a user namespace): %w", feature, err)
	case errors.Is(err, unix.ENOSYS):
		e.Missing = "CONFIG_FANOTIFY"
	case errors.Is(err, unix.EINVAL):
		e.Missing = "CONFIG_FANOTIFY_ACCESS_PERMISSIONS"
	default: // EMFILE, ENOMEM
		return fmt.Errorf("make a fanotify group (limits: fs.fanotify.max_user_groups, RLIMIT_NOFILE): %w", err)
	}
	return e
}

// markError explains an errno of fanotify_mark(2).
func markError(err error) error {
	e := &kernel.UnsupportedError{Feature: feature, Since: since, Err: err}
	switch {
	case errors.Is(err, unix.EINVAL):
		e.Missing = "CONFIG_FANOTIFY_ACCESS_PERMISSIONS"
	case errors.Is(err, unix.EOPNOTSUPP):
		e.Missing = "a directory on ext4, xfs or btrfs"
	default:
		return err
	}
	return e
}
