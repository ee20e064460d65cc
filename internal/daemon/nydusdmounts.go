package daemon

import (
	"context"
	"errors"
	"net/http"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/config"
)

// Mount mounts a bootstrap through the kernel's EROFS.
func (c *Control) Mount(ctx context.Context, mountpoint string, m nydus.MountCommand) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	if m.Type != nydus.Rafs {
		return nydus.MountFailed(errors.New("erofsd mounts rafs only: passthrough_fs needs FUSE"))
	}
	cfg, warnings, err := config.ParseNydus([]byte(m.Config))
	if err != nil {
		return nydus.BadRequest(err)
	}
	for _, w := range warnings {
		c.log.Debug("configuration of a mount", "mountpoint", mountpoint, "warning", w)
	}
	mounted, err := d.mountImage(ctx, mountRequest{api.MountRequest{Mountpoint: mountpoint, Bootstrap: m.Source}, &cfg})
	if err == nil && len(m.PrefetchFiles) > 0 {
		err = d.Prefetch(ctx, api.PrefetchRequest{Image: mounted.ID, DomainID: mounted.DomainID, Files: m.PrefetchFiles})
		if err != nil { // a hint that is of no use is no reason to fail
			c.log.Warn("prefetch of a mount", "mountpoint", mountpoint, "err", err)
			err = nil
		}
	}
	return mountError(err)
}

// mountError turns a refusal into nydusd's words.
func mountError(err error) error {
	if e := (*api.Error)(nil); errors.As(err, &e) {
		if e.Status == http.StatusNotFound {
			return nydus.NoEntry(err.Error())
		}
		return nydus.MountFailed(err)
	}
	return err
}

// Remount changes the configuration of a mount; with another bootstrap it is unmounted,
// and mounted again.
func (c *Control) Remount(ctx context.Context, mountpoint string, m nydus.MountCommand) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	img := d.mounted(mountpoint)
	if img == nil {
		return nydus.NoEntry("nothing is mounted at " + mountpoint)
	}
	cfg, _, err := config.ParseNydus([]byte(m.Config))
	if err != nil {
		return nydus.BadRequest(err)
	}
	f, err := openRegular(m.Source)
	if err != nil {
		return mountError(err)
	}
	sum, err := bootstrapID(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if sum == img.digest {
		return d.remount(ctx, img, cfg)
	}
	if err := d.Unmount(ctx, api.UnmountRequest{Mountpoint: mountpoint}); err != nil {
		return mountError(err)
	}
	return c.Mount(ctx, mountpoint, m)
}

// Unmount unmounts what is at a mount point.
func (c *Control) Unmount(ctx context.Context, mountpoint string) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	return mountError(d.Unmount(ctx, api.UnmountRequest{Mountpoint: mountpoint}))
}

// Superblock summarises the image at a mount point.
func (c *Control) Superblock(ctx context.Context, mountpoint string) (nydus.Superblock, error) {
	d, err := c.running()
	if err != nil {
		return nydus.Superblock{}, err
	}
	img := d.mounted(mountpoint)
	if img == nil {
		return nydus.Superblock{}, nydus.NoEntry("nothing is mounted at this place")
	}
	m, _, err := openImage(ctx, img.boot)
	if err != nil {
		return nydus.Superblock{}, err
	}
	return superblock(m), nil
}

func superblock(m *erofs.Image) nydus.Superblock {
	const (
		magic   = 0xe0f5e1e2
		version = 0x600
		size    = 128
	)
	r := m.RAFS()
	return nydus.Superblock{
		Magic: magic, Version: version, Size: size, RootInode: m.Root(), ChunkSize: r.ChunkSize,
		Inodes: m.Superblock().Inodes, Flags: nydus.Flags{Bits: r.Flags},
		ExtraBlobTableOffset: uint64(r.BlobTable), ExtraBlobTableEntries: uint32(len(m.BlobEntries())),
		BlobTableOffset: uint64(r.BlobTable), BlobTableSize: uint32(r.BlobTableLen),
		BlobDeviceTableCount: uint32(len(m.Devices())),
		PrefetchTableOffset:  uint64(max(r.Prefetch, 0)), PrefetchTableEntries: uint32(r.PrefetchLen / 4),
		ChunkTableOffset: uint64(r.ChunkTable), ChunkTableSize: uint64(r.ChunkTableLen), RootNid: uint16(m.Root()),
	}
}
