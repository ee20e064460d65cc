package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/config"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// A mount is one place where an image is mounted. It is in the table from the
// moment that its place is taken.
type mount struct {
	point  string
	source string    // reference or bootstrap path, for people
	img    *image    // nil until mounted; guarded by Daemon.mu
	since  time.Time // when it was mounted; guarded by Daemon.mu
	busy   bool      // being mounted or unmounted; guarded by Daemon.mu
}

// Mount mounts an image: it takes the place, gets and admits the bootstrap,
// opens the blobs, marks their cache files, and only then mounts.
func (d *Daemon) Mount(ctx context.Context, r api.MountRequest) (api.Mount, error) {
	return d.mountImage(ctx, mountRequest{MountRequest: r})
}

// A mountRequest is a request with what nydus's API adds: where a bootstrap's blobs are.
type mountRequest struct {
	api.MountRequest
	config *config.Image // nil: see MountRequest
}

func (d *Daemon) mountImage(ctx context.Context, r mountRequest) (api.Mount, error) {
	d.reap()
	if err := validate(r.MountRequest); err != nil {
		return api.Mount{}, api.BadRequest(err)
	}
	if err := d.nested(filepath.Clean(r.Mountpoint)); err != nil {
		return api.Mount{}, err
	}
	r.DomainID = ownDomain(r.DomainID)
	// The table of mounts knows places by their real names.
	place, err := filepath.EvalSymlinks(r.Mountpoint)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return api.Mount{}, api.NotFound(fmt.Errorf("mount point %s is missing; make the directory first", r.Mountpoint))
	case err != nil:
		return api.Mount{}, api.BadRequest(fmt.Errorf("mount point %s: %w", r.Mountpoint, err))
	}
	r.Mountpoint = place
	m, err := d.take(r.MountRequest)
	if err != nil {
		return api.Mount{}, err
	}
	img, err := d.mount(ctx, m, r)
	if err != nil {
		d.mu.Lock()
		delete(d.mounts, m.point)
		d.mu.Unlock()
		return api.Mount{}, fmt.Errorf("mount %s at %s: %w", m.source, m.point, err)
	}
	d.mu.Lock()
	m.img, m.busy, m.since = img, false, time.Now()
	d.mu.Unlock()
	d.log.Info("mounted", "image", img.key.id, "mountpoint", m.point)
	return d.describe(m), nil
}

// maxDomain bounds a domain_id, in bytes: it is a part of the names of cache files,
// beside a blob's id and suffixes. The kernel takes 248.
const maxDomain = 128

func validate(r api.MountRequest) error {
	switch {
	case !filepath.IsAbs(r.Mountpoint) || filepath.Clean(r.Mountpoint) == "/":
		return fmt.Errorf("mount point %q: want an absolute path below /", r.Mountpoint)
	case len(slices.DeleteFunc([]string{r.Bootstrap, r.Reference, r.Image}, func(s string) bool { return s == "" })) != 1:
		return errors.New("name an image: either a bootstrap file, a reference, or a bound image's id")
	case r.Bootstrap != "" && !filepath.IsAbs(r.Bootstrap):
		return fmt.Errorf("bootstrap %q: want an absolute path", r.Bootstrap)
	case r.BlobDir != "" && !filepath.IsAbs(r.BlobDir):
		return fmt.Errorf("blob directory %q: want an absolute path", r.BlobDir)
	case r.DomainID == "":
		return nil
	case len(r.DomainID) > maxDomain:
		return fmt.Errorf("domain_id has %d bytes, at most %d are allowed", len(r.DomainID), maxDomain)
	}
	return cachefiles.ValidateID(r.DomainID)
}

// nested refuses a place at or below one of our own mounts, by its name alone:
// looking at it could make the daemon wait for itself.
func (d *Daemon) nested(place string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.nestedLocked(place)
}

// nestedLocked is nested for callers that hold d.mu.
func (d *Daemon) nestedLocked(place string) error {
	for point := range d.mounts {
		if place == point {
			return api.Conflict(fmt.Errorf("mount point %s is busy: erofsd has mounted an image there; unmount it first", point))
		}
		if strings.HasPrefix(place, point+"/") {
			return api.Conflict(fmt.Errorf("mount point %s lies inside the image mounted at %s; choose another", place, point))
		}
	}
	return nil
}

// take reserves the mount point, a real path.
func (d *Daemon) take(r api.MountRequest) (*mount, error) {
	m := &mount{point: r.Mountpoint, source: cmp.Or(r.Reference, r.Bootstrap, r.Image), busy: true}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.nestedLocked(m.point); err != nil {
		return nil, err
	}
	d.mounts[m.point] = m
	return m, nil
}

// mount does what Mount says once the place is taken.
func (d *Daemon) mount(ctx context.Context, m *mount, r mountRequest) (*image, error) {
	target, err := openTarget(m.point)
	if err != nil {
		return nil, err
	}
	defer target.Close()
	src, err := d.resolve(ctx, r)
	if err != nil {
		return nil, err
	}
	img, err := d.acquire(ctx, src)
	if errors.Is(err, errRemoved) {
		d.keepOrigin(img, src, err)
		if src, err = d.resolve(ctx, r); err == nil {
			img, err = d.acquire(ctx, src)
		}
	}
	if err == nil && r.Image != "" {
		if err = d.upToDate(ctx, img, src); err != nil {
			d.release(img)
		}
	}
	d.keepOrigin(img, src, err)
	if err != nil {
		return nil, errors.Join(err, d.forgetUnknown(src))
	}
	if err := d.attach(ctx, img, target); err != nil {
		d.release(img)
		return nil, err
	}
	return img, nil
}

// keepOrigin leaves src's origin to img, which closes it, if that was opened with it.
func (d *Daemon) keepOrigin(img *image, src *source, err error) {
	if src == nil || src.bound {
		return
	}
	if err == nil {
		d.mu.Lock()
		used := img.src == src
		d.mu.Unlock()
		if used {
			return
		}
	}
	src.origin.close()
}

// forgetUnknown removes the bootstrap of an image that could not be opened, unless
// something else is kept of it. A mount that is about to open it gets it again.
func (d *Daemon) forgetUnknown(src *source) error {
	if src == nil || exists(d.file(src.key, recordSuffix)) {
		return nil
	}
	return d.removeFiles(src.key, []string{src.boot})
}

// openTarget opens the mount point without following anything below it.
func openTarget(point string) (*os.File, error) {
	busy, err := mountedAt(point)
	if err != nil {
		return nil, err
	}
	if busy != "" {
		return nil, api.Conflict(fmt.Errorf("mount point is busy: %s is mounted there; unmount it first", busy))
	}
	fd, err := syscall.Open(point, oPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return nil, api.NotFound(errors.New("mount point is missing; make the directory first"))
	case errors.Is(err, syscall.ENOTDIR):
		return nil, api.BadRequest(errors.New("mount point is not a directory"))
	case err != nil:
		return nil, fmt.Errorf("open mount point: %w", err)
	}
	return os.NewFile(uintptr(fd), point), nil
}

// oPath is O_PATH, which package syscall lacks.
const oPath = 0x200000

// mountedAt returns the type of the file system that is mounted exactly at
// point, "" if none is.
func mountedAt(point string) (string, error) {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != point, false })
	if err != nil {
		return "", fmt.Errorf("read the table of mounts: %w", err)
	}
	if len(infos) == 0 {
		return "", nil
	}
	return infos[len(infos)-1].FSType, nil
}

// attach mounts img at target: as a further mount of the same file system where there
// is one, which then has one page cache, else anew.
func (d *Daemon) attach(ctx context.Context, img *image, target *os.File) error {
	if m := d.mountOf(img); m != nil {
		err := d.mounter.Mount(ctx, MountSpec{Target: target, Clone: m})
		if err == nil {
			return nil
		}
		d.log.Debug("clone a mount", "mountpoint", m.Point, "err", err) // it may be gone by now
	}
	failpoint.Hit("daemon.mount")
	defer failpoint.Hit("daemon.mounted")
	return d.kernel.mount(ctx, img, MountSpec{Target: target})
}

// mountOf returns a mount of img, nil if there is none.
func (d *Daemon) mountOf(img *image) *Mounted {
	d.mu.Lock()
	var points []string
	for point, m := range d.mounts {
		if m.img == img && !m.busy {
			points = append(points, point)
		}
	}
	d.mu.Unlock()
	if len(points) == 0 {
		return nil
	}
	own, err := d.ownMounts()
	if err != nil {
		return nil // a fresh mount says what is wrong
	}
	for _, o := range own {
		if o.key == img.key && slices.Contains(points, o.Point) {
			return &o.Mounted
		}
	}
	return nil
}

// keep adds a mount that exists to the table.
func (d *Daemon) keep(m *mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mounts[m.point] = m
}
