package cachefiles

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/kernel"
)

// DevicePath is the device's usual place.
const DevicePath = "/dev/cachefiles"

const feature = "cachefiles on-demand mode"

// since is the first kernel that has it, removed the first that has not; for
// messages only.
var (
	since   = kernel.Version{Major: 5, Minor: 19}
	removed = kernel.Version{Major: 7, Minor: 2}
)

// ErrInUse says that an object or a volume cannot be culled, because it is live.
var ErrInUse = errors.New("in use")

// A Device is an open cachefiles device, which owns one cache. Its methods are
// safe for concurrent use, but Bind comes before all others.
type Device struct {
	f     *os.File
	calls Calls
	dir   string // the cache root; empty until Bind
}

// Open opens the device; an empty path means [DevicePath]. It needs
// CAP_SYS_ADMIN in the initial user namespace, and only one process of the
// machine can have it open. The error is a *kernel.UnsupportedError when there
// is no such device.
func Open(path string) (*Device, error) {
	if path == "" {
		path = DevicePath
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, openError(path, err)
	}
	return newDevice(os.NewFile(uintptr(fd), path), "", kernelCalls{})
}

// NewDevice makes a Device of f, which another process has opened and bound to
// dir. It owns f from then on, also with an error: it makes it close-on-exec and
// non-blocking, the latter for all who share it.
func NewDevice(f *os.File, dir string) (*Device, error) {
	return NewFakeDevice(f, dir, kernelCalls{})
}

// NewFakeDevice is [NewDevice] with other system calls, for package
// cachefilestest: f is what the runtime polls before Read.
func NewFakeDevice(f *os.File, dir string, calls Calls) (*Device, error) {
	var own *os.File
	err := control(f, func(fd int) error {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetNonblock(dup, true); err != nil {
			return errors.Join(err, unix.Close(dup))
		}
		own = os.NewFile(uintptr(dup), f.Name()) // looks at the mode: f itself may not be polled
		return nil
	})
	err = errors.Join(err, f.Close())
	if err != nil {
		if own != nil {
			own.Close()
		}
		return nil, fmt.Errorf("take over cachefiles device %s: %w", f.Name(), err)
	}
	return newDevice(own, dir, calls)
}

func newDevice(f *os.File, dir string, calls Calls) (*Device, error) {
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("use %s as a cachefiles device: want a descriptor that can be polled: %w", f.Name(), err), f.Close())
	}
	return &Device{f: f, calls: calls, dir: dir}, nil
}

// openError explains an errno of open(2).
func openError(path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return &kernel.UnsupportedError{
			Feature: feature, Since: since, Removed: removed, Err: &fs.PathError{Op: "open", Path: path, Err: err},
			Missing: "CONFIG_CACHEFILES_ONDEMAND, its module cachefiles loaded, and the device's node in this container",
		}
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("open %s: another daemon has it%s (erofsd, nydusd or cachefilesd; a process that died inside its own mount counts): stop that one: %w", path, holders("/proc", path), err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("open %s: need CAP_SYS_ADMIN in the initial user namespace (run as root, outside of a user namespace, and allow the device in the container's cgroup): %w", path, err)
	default:
		return fmt.Errorf("open %s: %w", path, err)
	}
}

// command writes one command; the error is an errno.
func (d *Device) command(c string) error {
	return control(d.f, func(fd int) error { return d.calls.Command(fd, c) })
}

// Restore makes the kernel ask again what an earlier daemon left unanswered. It
// must come before [Server.Serve], or requests are answered twice, and no file
// of an OPEN that was not accepted may be open any more. The error is a
// *kernel.UnsupportedError on a kernel that cannot.
func (d *Device) Restore() error {
	switch err := d.command("restore"); {
	case errors.Is(err, unix.EOPNOTSUPP):
		return &kernel.UnsupportedError{
			Feature: "restoring the requests of an earlier daemon", Since: kernel.Version{Major: 6, Minor: 8},
			Missing: "the command restore of cachefiles (linux 6.8, or 6.1.95 of that series)", Err: err,
		}
	case err != nil:
		return fmt.Errorf("restore the requests of an earlier daemon: %w", deadHint(err))
	}
	return nil
}

// InUse reports whether the object of k is live. The error is fs.ErrNotExist
// when it is not on disk; a live object that was made by this very mount is not
// there yet either.
func (d *Device) InUse(k Key) (bool, error) {
	if err := k.Validate(); err != nil {
		return false, err
	}
	dir, name := k.place()
	err := d.commandIn(dir, "inuse "+name)
	if errors.Is(err, ErrInUse) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for users of cached object %s in %s: %w", k.Cookie, k.Volume, err)
	}
	return false, nil
}

// Cull deletes the object of k. The error is [ErrInUse] while it is live, and for
// a moment after its Close: the kernel puts it in order then. It is
// fs.ErrNotExist when the object is not on disk.
func (d *Device) Cull(k Key) error {
	if err := k.Validate(); err != nil {
		return err
	}
	dir, name := k.place()
	if err := d.commandIn(dir, "cull "+name); err != nil {
		return fmt.Errorf("cull cached object %s of %s: %w", k.Cookie, k.Volume, err)
	}
	return nil
}

// CullVolume deletes a volume with all its objects, and what else lies in the
// graveyard. The error is [ErrInUse] while anything of the volume is mounted,
// and for a moment after, and fs.ErrNotExist when it is not on disk.
func (d *Device) CullVolume(volume string) error {
	if err := (Key{Volume: volume, Cookie: "any"}).Validate(); err != nil {
		return err
	}
	dir, name := path.Split(VolumePath(volume))
	if err := d.commandIn(path.Clean(dir), "cull "+name); err != nil {
		return fmt.Errorf("cull cached volume %s: %w", volume, err)
	}
	if err := d.emptyGraveyard(); err != nil {
		return fmt.Errorf("empty the graveyard of cache %s: %w", d.dir, err)
	}
	return nil
}

// commandIn gives a command that acts in dir.
func (d *Device) commandIn(dir, command string) error {
	err := control(d.f, func(fd int) error { return d.calls.CommandIn(fd, d.dir, dir, command) })
	switch {
	case errors.Is(err, unix.EBUSY):
		return ErrInUse
	case errors.Is(err, unix.ESTALE): // it went away meanwhile
		return fs.ErrNotExist
	default:
		return deadHint(err)
	}
}

// emptyGraveyard deletes what the kernel has put there. The directory itself
// belongs to the kernel: without it the cache is dead.
func (d *Device) emptyGraveyard() error {
	root, err := os.OpenRoot(d.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	graveyard, err := root.OpenRoot("graveyard")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer graveyard.Close()
	entries, err := fs.ReadDir(graveyard.FS(), ".")
	for _, e := range entries {
		err = errors.Join(err, graveyard.RemoveAll(e.Name()))
	}
	return err
}

// deadHint explains an errno that any command can meet.
func deadHint(err error) error {
	if errors.Is(err, unix.EIO) {
		return fmt.Errorf("the kernel has given up this cache after an error of its file system (see dmesg) or it is not bound; unmount all images and start again: %w", err)
	}
	return err
}

// File returns the device's own descriptor, for handing a duplicate to a process
// that holds it. It belongs to the device: do not close it, nor make it blocking.
func (d *Device) File() *os.File { return d.f }

// Dir returns the cache root, or nothing before Bind.
func (d *Device) Dir() string { return d.dir }

// Close closes the descriptor; a second call does nothing. When it was the last
// one and no object's file is open, the cache ends: its mounts get EIO for all
// that is not in the page cache, for ever, and only a new mount helps.
func (d *Device) Close() error {
	if err := d.f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close cachefiles device: %w", err)
	}
	return nil
}
