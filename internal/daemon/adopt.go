package daemon

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/erofs"
)

// adopt takes over the mounts of a daemon that ended before this one. Complete
// images never noticed and stay. An incomplete one may have given zeros to its
// readers, who keep them in the page cache: it is detached, so that nobody new
// finds it, and those who are inside get EIO for what is missing.
func (d *Daemon) adopt(ctx context.Context) error {
	images := filepath.Join(d.o.Root, "images") + "/"
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("erofs"))
	if err != nil {
		return err
	}
	for _, i := range infos {
		name, ours := strings.CutPrefix(i.Source, images)
		id, isBoot := strings.CutSuffix(name, ".boot")
		if !ours || !isBoot || strings.Contains(id, "/") {
			continue
		}
		if d.adoptOne(ctx, &source{id: id, boot: i.Source, label: i.Source, store: d.stores.directory("")}, i.Mountpoint) {
			d.log.Info("took over a complete image", "image", id, "mountpoint", i.Mountpoint)
			continue
		}
		d.log.Error("detaching an incomplete image that an earlier daemon left: its readers may have got zeros; "+
			"restart those who use it and mount it again", "image", id, "mountpoint", i.Mountpoint)
		if err := erofs.Unmount(i.Mountpoint, true); err != nil {
			d.log.Error("detach", "mountpoint", i.Mountpoint, "err", err)
		}
	}
	return nil
}

// adoptOne adds the mount at point to the table if its image is complete. If
// it is not, its files are marked all the same and stay so while they are used.
func (d *Daemon) adoptOne(ctx context.Context, src *source, point string) bool {
	img, err := d.acquire(ctx, src)
	if err != nil {
		d.log.Warn("open the image of an earlier daemon", "image", src.id, "err", err)
		return false
	}
	if err := d.pin(img.watches); err != nil {
		d.log.Warn("mark the files of an earlier daemon", "image", src.id, "err", err)
	}
	defer d.unpin(img.watches)
	m := &mount{point: point, source: src.label, img: img}
	if !d.describe(m).Complete {
		defer d.release(img)
		return false
	}
	d.mu.Lock()
	d.mounts[point] = m
	d.mu.Unlock()
	return true
}
