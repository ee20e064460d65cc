package daemon

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"slices"
	"time"

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
		return nydus.Superblock{}, nydus.Unsupported()
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

// The kernel counts what programs do with files; there is no counter here.

// FsStats has nothing to tell.
func (c *Control) FsStats(string) (nydus.FsStats, error) { return nydus.FsStats{}, nydus.NoCounter() }

// FsFiles has nothing to tell.
func (c *Control) FsFiles(string, bool) (nydus.FsFiles, error) {
	return nydus.FsFiles{}, nydus.NoCounter()
}

// FsPattern has nothing to tell.
func (c *Control) FsPattern(string) ([]nydus.FilePattern, error) { return nil, nydus.NoCounter() }

// Inflight is FUSE's.
func (c *Control) Inflight() ([]nydus.Inflight, error) { return nil, nydus.Unsupported() }

// described is what the metrics of some images need.
type described struct {
	images []*image        // open
	blobs  map[string]bool // of images that are bound or open
	meters map[*meter]struct{}
	kind   string // of backend
	begun  time.Time
}

// find returns the images that id means, all without one; nil when there are none.
func (d *Daemon) find(id string) *described {
	f := &described{blobs: map[string]bool{}, meters: map[*meter]struct{}{}}
	found := false
	take := func(k imageKey, src *source) bool {
		name := ""
		if src != nil && src.config != nil {
			name = src.config.ID
		}
		if id != "" && !calls(id, k, name) {
			return false
		}
		found = true
		if src != nil && src.meter != nil {
			f.meters[src.meter] = struct{}{}
			f.kind = src.kind
		}
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for k, b := range d.bindings {
		if take(k, b.src) {
			for _, e := range b.blobs {
				f.blobs[e.ID] = true
			}
		}
	}
	for k, img := range d.images {
		if !img.isOpen() || !take(k, img.src) {
			continue
		}
		f.images = append(f.images, img)
		for _, v := range img.devices {
			f.blobs[v.id] = true
		}
	}
	if !found {
		return nil
	}
	return f
}

// BackendMetrics adds up the reads of the images that id means.
func (c *Control) BackendMetrics(id string) (nydus.BackendMetrics, error) {
	d, err := c.running()
	if err != nil {
		return nydus.BackendMetrics{}, err
	}
	f := d.find(id)
	if f == nil {
		return nydus.BackendMetrics{}, nydus.NoCounter()
	}
	out := nydus.BackendMetrics{Type: f.kind}
	for m := range f.meters {
		m.addTo(&out)
	}
	return out, nil
}

// CacheMetrics adds up the caches of the images that id means.
func (c *Control) CacheMetrics(id string) (nydus.CacheMetrics, error) {
	d, err := c.running()
	if err != nil {
		return nydus.CacheMetrics{}, err
	}
	f := d.find(id)
	if f == nil {
		return nydus.CacheMetrics{}, nydus.NoCounter()
	}
	out := nydus.CacheMetrics{Files: []string{}, Dir: filepath.Join(d.o.Root, "cache"), Complete: len(f.images) > 0}
	if d.kernel.name() == Cachefiles {
		out.Dir = d.o.cacheDir()
	}
	for id := range f.blobs {
		out.Files = append(out.Files, id+".blob.data")
	}
	slices.Sort(out.Files)
	seen := map[*device]bool{}
	for _, img := range f.images {
		for _, v := range img.devices {
			if !seen[v] {
				seen[v] = true
				v.addTo(&out)
			}
		}
	}
	return out, nil
}

// addTo adds v to m.
func (v *device) addTo(m *nydus.CacheMetrics) {
	s := v.blob.Stats()
	events, ready := uint64(v.events.Load()), uint64(v.ready.Load())
	m.Total += events
	m.WholeHits += ready
	m.PartialHits += events - min(ready, events)
	m.Entries += uint64(s.Chunks)
	m.PrefetchBytes += uint64(s.Unasked)
	m.PrefetchRequests += uint64(s.UnaskedRequests)
	m.PrefetchWorkers += uint64(s.Workers)
	m.Complete = m.Complete && s.Complete
	if s.UnaskedSince.IsZero() {
		return
	}
	begin, end := uint64(s.UnaskedSince.UnixMilli()), uint64(s.UnaskedUntil.UnixMilli())
	if old := m.PrefetchBeginSecond*1000 + m.PrefetchBeginMillis; old == 0 || begin < old {
		m.PrefetchBeginSecond, m.PrefetchBeginMillis = begin/1000, begin%1000
	}
	if end > m.PrefetchEndSecond*1000+m.PrefetchEndMillis {
		m.PrefetchEndSecond, m.PrefetchEndMillis = end/1000, end%1000
	}
	m.PrefetchMillis += end - min(begin, end)
}
