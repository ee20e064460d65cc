package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// Unmount unmounts the image at a mount point. An image that is used elsewhere
// (a container's overlay keeps it) is served until nobody uses it.
func (d *Daemon) Unmount(ctx context.Context, r api.UnmountRequest) error {
	d.reap()
	point := d.place(r.Mountpoint)
	d.mu.Lock()
	m := d.mounts[point]
	if m == nil || m.busy {
		d.mu.Unlock()
		if m == nil {
			return api.NotFound(fmt.Errorf("unmount %s: erofsd has no image mounted there (see erofsctl status)", point))
		}
		return api.Conflict(fmt.Errorf("unmount %s: it is being mounted or unmounted; try again", point))
	}
	m.busy = true
	d.mu.Unlock()

	err := d.mounter.Unmount(ctx, point, false)
	failpoint.Hit("daemon.unmounted")
	d.mu.Lock()
	m.busy = false
	if err == nil {
		delete(d.mounts, point)
	}
	d.mu.Unlock()
	switch {
	case errors.Is(err, syscall.EBUSY):
		return api.Conflict(fmt.Errorf("unmount %s: it is busy: a process works in it or has a file of it open (fuser -vm %s shows them)", point, point))
	case err != nil:
		return fmt.Errorf("unmount %s: %w", point, err)
	}
	d.release(m.img)
	d.log.Info("unmounted", "image", m.img.key.id, "mountpoint", point)
	return nil
}

// place returns the key of the mount that the user calls name, perhaps by way of
// symbolic links.
func (d *Daemon) place(name string) string {
	name = filepath.Clean(name)
	if d.mountAt(name) != nil {
		return name
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(name)); err == nil {
		return filepath.Join(real, filepath.Base(name))
	}
	return name
}

// mountAt returns the mount whose place is called name in the table, nil if there is none.
func (d *Daemon) mountAt(name string) *mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mounts[name]
}

// mounted returns the image at a mount point, nil if there is none.
func (d *Daemon) mounted(name string) *image {
	point := d.place(name)
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.mounts[point]; m != nil {
		return m.img
	}
	return nil
}

// reap forgets mounts that somebody else unmounted: those that were in the table before
// the kernel was asked, and that it does not have.
func (d *Daemon) reap() {
	d.mu.Lock()
	known := map[string]*mount{}
	for point, m := range d.mounts {
		if !m.busy {
			known[point] = m
		}
	}
	d.mu.Unlock()
	if len(known) == 0 && d.o.Holder == nil {
		return
	}
	mounts, err := d.mounter.Mounted()
	if err != nil {
		d.log.Warn("read the table of mounts", "err", err)
		return
	}
	if d.o.Holder != nil {
		d.adoptStrays(d.own(mounts))
	}
	for _, m := range mounts {
		delete(known, m.Point)
	}
	d.mu.Lock()
	for point, m := range known {
		if d.mounts[point] == m && !m.busy {
			delete(d.mounts, point)
		} else {
			delete(known, point)
		}
	}
	d.mu.Unlock()
	for point, m := range known {
		d.log.Info("was unmounted by somebody else", "image", m.img.key.id, "mountpoint", point)
		d.release(m.img)
	}
}

// adoptStrays takes over images that were mounted after this worker had looked: with
// cachefiles by a helper that its predecessor left in the middle of its work, with fanotify
// (where that has ended before, see gate.go) those that could not be opened at first, and what
// somebody else has mounted in a second place.
func (d *Daemon) adoptStrays(own []ownMount) {
	ctx, cancel := context.WithTimeout(d.ctx, adoptTime)
	defer cancel()
	for _, o := range own {
		if d.mountAt(o.Point) != nil {
			continue
		}
		img, src, err := d.reacquire(ctx, o.key)
		if err == nil {
			if err = d.kernel.found(ctx, img); err != nil {
				d.release(img)
			}
		}
		if err != nil {
			d.log.Warn("cannot go on with an image that this worker did not mount", "image", o.key.id, "mountpoint", o.Point, "err", err)
			continue
		}
		if !d.keepStray(&mount{point: o.Point, source: src.label, img: img, busy: true}) {
			d.release(img)
			continue
		}
		d.log.Info("goes on with an image that this worker did not mount", "image", o.key.id, "mountpoint", o.Point)
	}
}

// keepStray adds m, which is busy, to the table. It returns false when it is there already,
// or was unmounted since the table of mounts was read.
func (d *Daemon) keepStray(m *mount) bool {
	d.mu.Lock()
	taken := d.mounts[m.point] != nil
	if !taken {
		d.mounts[m.point] = m
	}
	d.mu.Unlock()
	if taken {
		return false
	}
	kind, err := mountedAt(m.point)
	there := kind == "erofs" || err != nil
	d.mu.Lock()
	defer d.mu.Unlock()
	m.busy = false
	if !there {
		delete(d.mounts, m.point)
	}
	return there
}

// shutdown unmounts everything. What is complete may stay: it needs no daemon.
// An incomplete image that is in use is served until it no longer is, or force
// is done: without us the kernel would give its readers zeros. It returns
// whether nobody needs us any more.
func (d *Daemon) shutdown(ctx, force context.Context) bool {
	if d.handedOver() != nil {
		d.log.Info("leaving the images mounted for the next daemon")
		return true
	}
	ctx = context.WithoutCancel(ctx)
	level := slog.LevelInfo
	for told := false; ; told = true {
		left := d.unmountAll(ctx, level)
		level = slog.LevelDebug // it is tried every second
		if left == 0 {
			return true
		}
		if d.o.Hasty && d.kernel.name() == Cachefiles {
			d.log.Warn("ended with incomplete images in use: what they lack reads as EIO", "images", left)
			return false
		}
		if !told {
			d.log.Warn("images are incomplete and in use; serving on until they are unmounted. "+
				"A second signal ends the daemon, and what they lack then reads as EIO", "images", left)
		}
		select {
		case <-force.Done():
			d.log.Error("ended with incomplete images in use", "images", left)
			return false
		case <-time.After(lingerEvery):
		}
	}
}

// unmountAll unmounts what can be, logs what cannot at level, and returns how many incomplete images the
// kernel still uses.
func (d *Daemon) unmountAll(ctx context.Context, level slog.Level) int {
	d.reap()
	var points []string
	d.mu.Lock()
	for point := range d.mounts {
		points = append(points, point)
	}
	d.mu.Unlock()
	for _, point := range points {
		if err := d.Unmount(ctx, api.UnmountRequest{Mountpoint: point}); err != nil {
			d.log.Log(ctx, level, "unmount at the end", "mountpoint", point, "err", err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	left := 0
	for _, img := range d.images {
		if d.kernel.busy(img) {
			left++
		}
	}
	return left
}
