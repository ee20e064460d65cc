package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
)

// The cgroup-v1 freezer may hold a reader up where it waits for the answer to its read,
// and between that and the read itself, for longer than any grace (blobmgr's evict.go).
// So no hole is punched within a grace of something frozen.
//
// A thaw is for how many ticks nothing frozen was seen. What is frozen for less than a
// tick may be missed, which is short of a grace.
type thaw int

// tick looks again. An error counts as something frozen.
func (t *thaw) tick() error {
	frozen, err := somethingFrozen()
	if frozen || err != nil {
		*t = 0
		return err
	}
	*t++
	return nil
}

// over reports whether nothing has been frozen for more than a grace.
func (t *thaw) over() bool { return *t > graceTicks }

func somethingFrozen() (bool, error) {
	p, err := os.ReadFile("/proc/cgroups")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return true, fmt.Errorf("look for cgroup-v1 freezers: %w", err)
	}
	if !hasFreezer(string(p)) {
		return false, nil
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" || m.Root != "/" || !strings.Contains(","+m.VFSOptions+",", ",freezer,"), false
	})
	if err == nil && len(mounts) == 0 {
		err = errors.New("it is not mounted here: mount it, or use cgroup v2 alone")
	}
	if err != nil {
		return true, fmt.Errorf("images in use keep their data: look what the cgroup-v1 freezer has frozen: %w", err)
	}
	return frozenBelow(mounts[0].Mountpoint)
}

// hasFreezer reports whether there is a cgroup-v1 freezer. Each line of /proc/cgroups
// names a controller and its hierarchy, 0 for none or cgroup v2's.
func hasFreezer(cgroups string) bool {
	for line := range strings.Lines(cgroups) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "freezer" {
			return f[1] != "0"
		}
	}
	return false
}

// frozenBelow reports whether a cgroup below root is frozen, or being so.
func frozenBelow(root string) (frozen bool, err error) {
	err = filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			return nil
		}
		var p []byte
		if err == nil {
			p, err = os.ReadFile(filepath.Join(name, "freezer.state")) // the root has none
		}
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENODEV): // it is gone
			return nil
		case err != nil:
			return err
		case string(p) != "THAWED\n":
			frozen = true
			return fs.SkipAll
		}
		return nil
	})
	return frozen || err != nil, err
}
