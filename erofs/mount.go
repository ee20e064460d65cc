package erofs

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// MaxMountValue is what the kernel takes as a source, a device or a name, in bytes
// (fsconfig(2), fs/fsopen.c, 6.18).
const MaxMountValue = 255

// MountOptions say what [Mount] mounts, and where. Every path has at most 255
// bytes; /proc/self/fd/N is one.
type MountOptions struct {
	Source  string   // the image, a regular file
	Devices []string // one for each slot of the device table, in that order
	// FSID makes it a mount over fscache (Linux 5.19 to 7.1): the image is the object
	// of this name in the volume of Domain, or its own; Devices are names of further
	// objects there; and Source is only what the table of mounts shows.
	FSID, Domain string
	Target       string // a directory
	// TargetFD is the directory when Target is empty: an open descriptor, with
	// O_PATH or without.
	TargetFD int
	// NoSuid and NoDev are the mount flags of these names, off by default
	// because container images have setuid programs and device nodes.
	NoSuid, NoDev bool
}

// Mount mounts an image that [Check] has accepted read-only through the kernel's
// EROFS driver, with the mount calls of Linux 5.2. It does so in the calling
// process and may wait for as long as the files behind Source and Devices do, so
// a process that serves these files itself must not call it. The error names the
// step, what the kernel has logged for it, and wraps the errno. After an error
// nothing is mounted.
//
// The kernel itself counts the devices, but a device that was refused before must
// not be passed over: the mount would succeed and read other bytes. Each step's
// error ends the mount for that reason.
func Mount(o MountOptions) error {
	if err := mount(o); err != nil {
		return fmt.Errorf("mount %s: %w", o.Source, err)
	}
	return nil
}

func mount(o MountOptions) (err error) {
	fd, err := detachedMount(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	dir, flags := o.TargetFD, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH
	if o.Target != "" {
		dir, flags = unix.AT_FDCWD, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS
	}
	if err := unix.MoveMount(fd, "", dir, o.Target, flags); err != nil {
		return fmt.Errorf("attach to %s: %w", o.target(), err)
	}
	return nil
}

func (o MountOptions) target() string {
	if o.Target == "" {
		return fmt.Sprintf("descriptor %d", o.TargetFD)
	}
	return o.Target
}

// detachedMount makes the mount and returns its descriptor. It is nowhere in the
// file tree yet and goes away with the descriptor.
func detachedMount(o MountOptions) (fd int, err error) {
	for _, v := range append([]string{o.Source, cmp.Or(o.FSID, "-"), cmp.Or(o.Domain, "-")}, o.Devices...) {
		if v == "" || len(v) > MaxMountValue || strings.ContainsRune(v, 0) {
			return -1, fmt.Errorf("%.300q has %d bytes, the kernel takes 1 to %d: use a shorter path or name", v, len(v), MaxMountValue)
		}
	}
	ctx, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open file system type erofs: %w%s", err, mountHint(err))
	}
	defer func() { err = errors.Join(err, unix.Close(ctx)) }()
	step := func(what string, err error) error {
		if err == nil {
			return nil
		}
		return fmt.Errorf("%s: %w%s", what, err, kernelMessages(ctx))
	}
	if err := step("set source", unix.FsconfigSetString(ctx, "source", o.Source)); err != nil {
		return -1, err
	}
	for _, v := range []struct{ key, value string }{{"fsid", o.FSID}, {"domain_id", o.Domain}} {
		if v.value == "" {
			continue
		}
		if err := step("set "+v.key, unix.FsconfigSetString(ctx, v.key, v.value)); err != nil {
			return -1, err
		}
	}
	for i, d := range o.Devices {
		if err := step(fmt.Sprintf("set device %d to %s", i, d), unix.FsconfigSetString(ctx, "device", d)); err != nil {
			return -1, err
		}
	}
	if err := step("set read-only", unix.FsconfigSetFlag(ctx, "ro")); err != nil {
		return -1, err
	}
	if err := step("read the image", unix.FsconfigCreate(ctx)); err != nil {
		return -1, err
	}
	attr := unix.MOUNT_ATTR_RDONLY
	if o.NoSuid {
		attr |= unix.MOUNT_ATTR_NOSUID
	}
	if o.NoDev {
		attr |= unix.MOUNT_ATTR_NODEV
	}
	fd, err = unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, attr)
	return fd, step("make the mount", err)
}

// Clone mounts the EROFS that is mounted at point, with the device number dev
// ("major:minor", as the table of mounts has it), once more at the directory targetFD.
// Anything else that is found at point is an error.
func Clone(point, dev string, targetFD int) (err error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, point, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("clone the mount at %s: %w", point, err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("clone the mount at %s: %w", point, err)
	}
	if have := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)); have != dev {
		return fmt.Errorf("clone the mount at %s: device %s is there, not %s: something else was mounted", point, have, dev)
	}
	if err := unix.MoveMount(fd, "", targetFD, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("clone the mount at %s: attach it: %w", point, err)
	}
	return nil
}

// mountHint says what helps against an error of the first call.
func mountHint(err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return " (needs CAP_SYS_ADMIN: run as root)"
	case errors.Is(err, unix.ENODEV):
		return " (needs a kernel with CONFIG_EROFS_FS)"
	}
	return ""
}

// kernelMessages returns what the kernel logged into the context for whoever
// makes the mount: one message a read, "e " before an error. Much of what EROFS
// says goes into the kernel's own log only.
func kernelMessages(ctx int) string {
	var s strings.Builder
	buf := make([]byte, 1024)
	for s.Len() < 4096 {
		n, err := unix.Read(ctx, buf)
		if err != nil || n <= 0 { // ENODATA: no more
			break
		}
		_, text, ok := strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
		if ok {
			s.WriteString(": " + text)
		}
	}
	if s.Len() == 0 {
		return " (the kernel's log says why)"
	}
	return s.String()
}

// Unmount unmounts target, which is not followed when it is a symbolic link.
// With detach it leaves the file tree at once and ends when nobody uses it any
// more; else a mount in use is EBUSY.
func Unmount(target string, detach bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if detach {
		flags |= unix.MNT_DETACH
	}
	if err := unix.Unmount(target, flags); err != nil {
		return &os.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

// readInMount reads the file name of the mount behind fd.
func readInMount(fd int, name string, p []byte) (err error) {
	file, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(file), name)
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = f.ReadAt(p, 0)
	return err
}
