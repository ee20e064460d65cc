package cachefiles

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/kernel"
)

// DefaultTag is the name of our cache among the kernel's.
const DefaultTag = "erofsd"

// fileSystems is what Bind asks for when a directory cannot be a cache.
const fileSystems = "a cache directory on ext4, xfs or btrfs"

// BindOptions say where the cache is.
type BindOptions struct {
	// Dir is the cache root, an absolute path of an existing directory on ext4,
	// xfs or btrfs. One directory has one live cache.
	Dir string
	// Tag names the cache in the kernel; default [DefaultTag]. Every daemon of a
	// machine must use the same: with another, new images are not to be had until
	// the dead mounts of an earlier daemon are gone.
	Tag string
}

// limits make the kernel cull and refuse as late as it can: we keep room
// ourselves. Each command must leave stop < cull < run, hence the order
// (fs/cachefiles/daemon.c, 6.1).
var limits = []string{"bstop 0%", "bcull 1%", "brun 2%", "fstop 0%", "fcull 1%", "frun 2%"}

// Bind starts the cache. It happens once: after an error close the device and
// open it anew. The error is a *kernel.UnsupportedError when the kernel or the
// directory's file system cannot do it.
func (d *Device) Bind(o BindOptions) error {
	if o.Tag == "" {
		o.Tag = DefaultTag
	}
	if d.dir != "" {
		return fmt.Errorf("bind cache %s: the device is bound to %s already", o.Dir, d.dir)
	}
	if err := validName(o.Tag, maxID); err != nil {
		return fmt.Errorf("bind cache %s: tag %q: %w", o.Dir, o.Tag, err)
	}
	if err := checkDir(o.Dir); err != nil {
		return fmt.Errorf("bind cache %s: %w", o.Dir, err)
	}
	commands := append(append([]string{}, limits...), "dir "+o.Dir, "tag "+o.Tag)
	for _, c := range commands {
		if err := d.command(c); err != nil {
			return fmt.Errorf("bind cache %s: command %q: %w", o.Dir, c, setupError(err))
		}
	}
	if err := d.command("bind ondemand"); err != nil {
		return fmt.Errorf("bind cache %s: %w", o.Dir, bindError(err, o))
	}
	d.dir = o.Dir
	return nil
}

// checkDir finds what the kernel would find later, or not say clearly.
func checkDir(dir string) error {
	if !filepath.IsAbs(dir) {
		return errors.New("the directory must be an absolute path")
	}
	if strings.ContainsAny(dir, "\n\x00") || len(dir) >= unix.PathMax-len("dir ") {
		return errors.New("the directory's name cannot be told to the kernel: it is too long or has a newline")
	}
	st, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create the directory first: %w", err)
	}
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return unix.ENOTDIR
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return fmt.Errorf("look at the directory's file system: %w", err)
	}
	switch s.Type {
	case unix.OVERLAYFS_SUPER_MAGIC: // 6.12 would take it
		return &kernel.UnsupportedError{Feature: "a cache on overlayfs", Missing: fileSystems + " (a volume, for a container)"}
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return &kernel.UnsupportedError{Feature: "a cache in memory (tmpfs)", Missing: fileSystems}
	}
	return nil
}

// setupError explains an errno of a command before bind.
func setupError(err error) error {
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("it was given before: open the device anew: %w", err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("not a cachefiles device: %w", err)
	}
	return deadHint(err)
}

// bindError explains an errno of bind (fs/cachefiles/daemon.c,
// cachefiles_daemon_bind, and cache.c, cachefiles_add_cache, 6.1).
func bindError(err error, o BindOptions) error {
	switch {
	case errors.Is(err, unix.EINVAL):
		return &kernel.UnsupportedError{
			Feature: feature, Since: since, Removed: removed, Err: err,
			Missing: "CONFIG_CACHEFILES_ONDEMAND (and a directory that is not on an id-mapped mount)",
		}
	case errors.Is(err, unix.EOPNOTSUPP):
		return &kernel.UnsupportedError{
			Feature: "a cache in " + o.Dir, Err: err,
			Missing: fileSystems + ": this one lacks O_TMPFILE, extended attributes, sync, or has blocks larger than a page",
		}
	case errors.Is(err, unix.EBUSY):
		return busyError(err, o.Tag)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("the file system is read-only: %w", err)
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("the file system is full: %s: %w", room(o.Dir), err)
	case errors.Is(err, unix.ERANGE):
		return fmt.Errorf("the limits of free space contradict each other: somebody else has changed them: %w", err)
	}
	return deadHint(err)
}

// busyError tells apart the two things that can be busy, by the kernel's list of
// caches where there is one.
func busyError(err error, tag string) error {
	list, rerr := os.ReadFile("/proc/fs/fscache/caches")
	switch {
	case rerr != nil:
		return fmt.Errorf("a live cache has this directory, or the tag %s: end the daemon it belongs to: %w", tag, err)
	case hasCache(list, tag):
		return fmt.Errorf("a live cache has the tag %s: end the daemon it belongs to: %w", tag, err)
	default:
		return fmt.Errorf("the kernel uses this directory for another cache: end the daemon it belongs to: %w", err)
	}
}

// hasCache looks for an active cache (state A) in /proc/fs/fscache/caches, whose
// columns are CACHE REF VOLS OBJS ACCES S NAME (fs/fscache/cache.c, 6.1).
func hasCache(list []byte, tag string) bool {
	for line := range bytes.Lines(list) {
		if f := bytes.Fields(line); len(f) == 7 && string(f[6]) == tag && string(f[5]) == "A" {
			return true
		}
	}
	return false
}

// room says in words how much of dir's file system is free.
func room(dir string) string {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return "its free space is unknown: " + err.Error()
	}
	return fmt.Sprintf("%d of %d MiB and %d of %d inodes are free",
		s.Bavail*uint64(s.Bsize)>>20, s.Blocks*uint64(s.Bsize)>>20, s.Ffree, s.Files)
}
