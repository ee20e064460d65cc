package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/erofsd/erofsd/cachefiles"
)

// What cachefiles has kept while the machine had another kernel is left to a daemon with
// fanotify, which takes from it what it does not have itself (blobmgr's siblings). The files are
// found by the names that the kernel gives them, nothing else is touched. Should a dead
// daemon's mounts still use one, they go on with it after it lost its name.

// sibling returns where cachefiles keeps a blob; empty if that cannot be.
func (d *Daemon) sibling(domain, id string) string {
	k := imageKey{domain: domain}.object(id)
	if k.Validate() != nil {
		return ""
	}
	return filepath.Join(d.o.cacheDir(), k.Path())
}

// leftUsage is how many bytes of disk the object id of k takes.
func (d *Daemon) leftUsage(k imageKey, id string) int64 {
	name := d.sibling(k.domain, id)
	if name == "" {
		return 0
	}
	n, err := diskOf(name)
	if err != nil {
		return 0
	}
	return n
}

// removeLeft removes the object id of k.
func (d *Daemon) removeLeft(k imageKey, id string) error {
	name := d.sibling(k.domain, id)
	if name == "" {
		return nil
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove what cachefiles has kept: %w", err)
	}
	return nil
}

// removeLeftVolume removes the directories of k's domain, unless something is in them.
func (d *Daemon) removeLeftVolume(k imageKey) error {
	volume := filepath.Join(d.o.cacheDir(), cachefiles.VolumePath(k.object("").Volume))
	entries, err := os.ReadDir(volume)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove what cachefiles has kept: %w", err)
	}
	for _, e := range entries {
		_ = syscall.Rmdir(filepath.Join(volume, e.Name())) // it is in use then
	}
	_ = syscall.Rmdir(volume)
	return nil
}

// dropLeft removes what another transport has kept of open images: it is there twice, or can
// be fetched. It returns how much the cache takes now, n before.
func (d *Daemon) dropLeft(all []kept, n int64) int64 {
	freed, err := d.blobs.DropSiblings()
	if err != nil {
		d.log.Warn("cannot remove from the full cache what another transport has kept", "err", err)
	}
	if freed == 0 {
		return n
	}
	d.log.Info("removed from the full cache what another transport has kept", "bytes", freed)
	return d.usage(all)
}

// diskOf is how many bytes of disk a file takes.
func diskOf(name string) (int64, error) {
	var st syscall.Stat_t
	if err := syscall.Lstat(name, &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}
