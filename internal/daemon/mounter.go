package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// A MountSpec says what a [Mounter] mounts. Exactly one of Clone, Devices (fanotify)
// and Domain (cachefiles) is set; an image without blobs has no Devices.
type MountSpec struct {
	Target *os.File // the directory, opened with O_PATH
	// Clone is a mount of the same image: the new one shares everything with it.
	Clone *Mounted

	Bootstrap *os.File   // complete; its name becomes the mount's source
	Devices   []*os.File // one for each slot
	// Cachefiles' names: the image's, the scope of sharing, and one for each slot.
	FSID, Domain string
	Cookies      []string
}

// A Mounted is a mounted EROFS.
type Mounted struct {
	Point, Source string
	Major, Minor  int // of its device number
}

// A Mounter mounts images. The daemon's own does it in a helper process; tests that
// bring a fake kernel bring a Mounter too.
type Mounter interface {
	Mount(ctx context.Context, s MountSpec) error
	// Unmount unmounts what is at point; with detach also when it is in use.
	Unmount(ctx context.Context, point string, detach bool) error
	// Mounted returns all mounted EROFS file systems.
	Mounted() ([]Mounted, error)
}

// helperMounter is the daemon's own Mounter; helper.go is its other half.
type helperMounter struct {
	// run runs a helper process: runHere, or a mounter's run. It returns when the helper has
	// ended, also if ctx has.
	run func(ctx context.Context, files []*os.File, args ...string) error
}

// runHere runs helpers without a mounter, for the images in a directory.
func runHere(images string) func(ctx context.Context, files []*os.File, args ...string) error {
	return func(ctx context.Context, files []*os.File, args ...string) error {
		gate, err := enterGate(images)
		if err != nil {
			return err
		}
		defer gate.Close()
		return runHelper(ctx, gate, files, args...)
	}
}

func (helperMounter) Mounted() ([]Mounted, error) {
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("erofs"))
	if err != nil {
		return nil, err
	}
	var out []Mounted
	for _, i := range infos {
		out = append(out, Mounted{i.Mountpoint, i.Source, i.Major, i.Minor})
	}
	return out, nil
}

func (h helperMounter) Mount(ctx context.Context, s MountSpec) error {
	switch {
	case s.Clone != nil:
		dev := strconv.Itoa(s.Clone.Major) + ":" + strconv.Itoa(s.Clone.Minor)
		return h.run(ctx, []*os.File{s.Target}, "clone", s.Clone.Point, dev)
	case s.FSID != "":
		return h.run(ctx, []*os.File{s.Target}, append([]string{"mount-fscache", s.Bootstrap.Name(), s.FSID, s.Domain}, s.Cookies...)...)
	default:
		return h.run(ctx, append([]*os.File{s.Target, s.Bootstrap}, s.Devices...), "mount-files", s.Bootstrap.Name(), strconv.Itoa(len(s.Devices)))
	}
}

func (h helperMounter) Unmount(ctx context.Context, point string, detach bool) error {
	if detach {
		return h.run(ctx, nil, "detach", point)
	}
	return h.run(ctx, nil, "unmount", point)
}

// An ownMount is a mount of this root, perhaps of an earlier daemon.
type ownMount struct {
	Mounted
	key imageKey
}

// ownMounts returns the mounts whose source is a bootstrap of ours.
func (d *Daemon) ownMounts() ([]ownMount, error) {
	mounts, err := d.mounter.Mounted()
	return d.own(mounts), err
}

// own returns those of mounts whose source is a bootstrap of ours.
func (d *Daemon) own(mounts []Mounted) []ownMount {
	var own []ownMount
	for _, m := range mounts {
		name, ours := strings.CutPrefix(m.Source, filepath.Join(d.o.Root, "images")+"/")
		key, isBoot := strings.CutSuffix(name, bootSuffix)
		if ours && isBoot && !strings.Contains(key, "/") {
			own = append(own, ownMount{m, parseImageKey(key)})
		}
	}
	return own
}
