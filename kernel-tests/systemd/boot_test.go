package systemd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// initName is argv[0] of the process that makes the inside of a machine and becomes its
// systemd. Its arguments are the machine's directory and units to start.
const initName = "erofsd-test-init"

// What a machine's directory has, and where the machine sees it. Its root is a tmpfs with
// the host's /usr; nothing of the host can be changed from inside.
var inside = []struct{ outside, at string }{
	{"bin", "/usr/local/bin"},
	{"units", "/etc/systemd/system"},
	{"state", "/var/lib/erofsd"},
	{"images", "/images"},
	{"snapshots", "/var/lib/containerd"},
	{"source", "/source"},
}

// runInit becomes systemd, or returns why not.
func runInit(args []string) error {
	dir := args[0]
	root := filepath.Join(dir, "root")
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("leave the host's mounts alone: %w", err)
	}
	for _, step := range []func(dir, root string) error{makeRoot, mountKernel, makeDevices, chooseUnits, mountInside, enter} {
		if err := step(dir, root); err != nil {
			return err
		}
	}
	return syscall.Exec(systemdProgram, append([]string{systemdProgram, "--system"}, args[1:]...), machineEnv)
}

const systemdProgram = "/usr/lib/systemd/systemd"

// machineEnv is the environment of systemd, as a container's.
var machineEnv = []string{"container=erofsd-test", "PATH=/usr/local/bin:/usr/bin:/usr/sbin", "LANG=C.UTF-8"}

// mount mounts at a directory, which it makes.
func mount(source, target, kind string, flags uintptr, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s %s at %s: %w", kind, source, target, err)
	}
	return nil
}

// bindReadOnly shows source at target, where nothing can be changed.
func bindReadOnly(source, target string) error {
	if err := mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

// makeRoot makes the root directory, as it is where systemd finds only /usr.
func makeRoot(_, root string) error {
	err := errors.Join(mount("tmpfs", root, "tmpfs", 0, "mode=755"), bindReadOnly("/usr", filepath.Join(root, "usr")))
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		err = errors.Join(err, os.Symlink("usr/"+name, filepath.Join(root, name)))
	}
	for _, name := range []string{"etc", "var/lib", "var/log", "mnt", "root"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(root, name), 0o755))
	}
	for name, text := range map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\nsystemd-journal:x:101:\n",
		"machine-id": strings.Repeat("e", 32) + "\n", "hosts": "127.0.0.1 localhost\n",
	} {
		err = errors.Join(err, os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644))
	}
	for _, name := range []string{"run", "tmp"} {
		err = errors.Join(err, mount("tmpfs", filepath.Join(root, name), "tmpfs", 0, "mode=755"))
	}
	return err
}

// mountKernel shows what the kernel shows, with settings that cannot be changed: they are
// the host's.
func mountKernel(_, root string) error {
	proc, sys := filepath.Join(root, "proc"), filepath.Join(root, "sys")
	return errors.Join(
		mount("proc", proc, "proc", 0, ""),
		bindReadOnly(proc+"/sys", proc+"/sys"),
		mount("sysfs", sys, "sysfs", unix.MS_RDONLY, ""),
		mount("cgroup2", sys+"/fs/cgroup", "cgroup2", 0, ""),
	)
}

// makeDevices makes those that are nobody's.
func makeDevices(_, root string) error {
	dev := filepath.Join(root, "dev")
	err := mount("tmpfs", dev, "tmpfs", 0, "mode=755")
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9} {
		path := filepath.Join(dev, name)
		err = errors.Join(err, unix.Mknod(path, unix.S_IFCHR, int(unix.Mkdev(1, minor))), os.Chmod(path, 0o666))
	}
	if info, serr := os.Stat("/dev/cachefiles"); serr == nil {
		number := info.Sys().(*syscall.Stat_t).Rdev
		err = errors.Join(err, unix.Mknod(filepath.Join(dev, "cachefiles"), unix.S_IFCHR|0o600, int(number)))
	}
	for name, target := range map[string]string{"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		err = errors.Join(err, os.Symlink("/proc/self/"+target, filepath.Join(dev, name)))
	}
	return errors.Join(err, mount("tmpfs", dev+"/shm", "tmpfs", 0, "mode=1777"))
}

// chooseUnits leaves only targets and the journal of the units that the host has, and none
// of its generators: everything else is about machines.
func chooseUnits(_, root string) error {
	lib := filepath.Join(root, "usr/lib/systemd")
	err := errors.Join(
		mount("tmpfs", lib+"/system", "tmpfs", 0, "mode=755"),
		mount("tmpfs", lib+"/system-generators", "tmpfs", 0, "mode=755"),
	)
	for _, pattern := range []string{"*.target", "systemd-journald.service", "systemd-journald.socket", "containerd.service"} {
		names, gerr := filepath.Glob("/usr/lib/systemd/system/" + pattern)
		err = errors.Join(err, gerr)
		for _, name := range names {
			text, rerr := os.ReadFile(name)
			err = errors.Join(err, rerr, os.WriteFile(filepath.Join(lib, "system", filepath.Base(name)), text, 0o644))
		}
	}
	wants := filepath.Join(lib, "system/sysinit.target.wants")
	return errors.Join(err, os.Mkdir(wants, 0o755), os.Symlink("../systemd-journald.service", wants+"/systemd-journald.service"))
}

// mountInside shows what is the machine's own.
func mountInside(dir, root string) error {
	for _, m := range inside {
		if err := mount(filepath.Join(dir, m.outside), filepath.Join(root, m.at), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// enter makes root the root (pivot_root(2), "pivot_root(".", ".")").
func enter(_, root string) error {
	err := errors.Join(mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""), os.Chdir(root))
	if err != nil {
		return err
	}
	err = unix.PivotRoot(".", ".")
	switch err {
	case nil:
		err = unix.Unmount(".", unix.MNT_DETACH) // and holds nothing of the host's
	case unix.EINVAL: // a guest's first file system cannot be left
		err = errors.Join(unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."))
	}
	if err == nil {
		err = errors.Join(os.Chdir("/"), unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")) // as systemd has it
	}
	return err
}
