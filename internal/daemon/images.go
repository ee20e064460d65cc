package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/config"
)

// BindImage makes an image known under the name that r gives it.
func (d *Daemon) BindImage(ctx context.Context, r api.BindRequest) error {
	document := []byte(r.Config)
	if toml := ""; json.Unmarshal(document, &toml) == nil {
		document = []byte(toml)
	}
	c, warnings, err := config.ParseNydus(document)
	if err != nil {
		return api.BadRequest(fmt.Errorf("bind image %s: config: %w", r.ID, err))
	}
	for _, w := range warnings {
		d.log.Warn("configuration of an image", "image", r.ID, "warning", w)
	}
	return d.Bind(ctx, boundImage{
		key: imageKey{ownDomain(r.DomainID), r.ID}, bootstrap: r.Bootstrap, config: c, pinned: r.Pinned,
	})
}

// UnbindImage forgets a bound image. If it is mounted it is served on.
func (d *Daemon) UnbindImage(_ context.Context, r api.ImageRequest) error {
	if r.Image == "" {
		return api.BadRequest(errors.New("unbind: name an image"))
	}
	return d.Unbind(imageKey{ownDomain(r.DomainID), r.Image})
}

// Pin says whether a full cache keeps an image.
func (d *Daemon) Pin(ctx context.Context, r api.PinRequest) error {
	k := imageKey{ownDomain(r.DomainID), r.Image}
	if err := validateBound(k); err != nil {
		return api.BadRequest(fmt.Errorf("pin image: %w", err))
	}
	if err := d.removing.take(ctx); err != nil { // nobody removes it meanwhile
		return err
	}
	defer d.removing.give()
	kept, err := d.readRecord(k)
	if errors.Is(err, fs.ErrNotExist) {
		return api.NotFound(fmt.Errorf("pin image %s: nothing is kept of it (see erofsctl status)", k))
	}
	if err != nil {
		return err
	}
	kept.Pinned = r.Pinned
	return d.writeRecordFile(k, kept)
}

// Usage returns what an image takes.
func (d *Daemon) Usage(_ context.Context, r api.ImageRequest) (api.Usage, error) {
	k := imageKey{ownDomain(r.DomainID), r.Image}
	if err := validateBound(k); err != nil {
		return api.Usage{}, api.BadRequest(fmt.Errorf("usage of image: %w", err))
	}
	rec, err := d.readRecord(k)
	if errors.Is(err, fs.ErrNotExist) {
		return api.Usage{}, api.NotFound(fmt.Errorf("usage of image %s: nothing is kept of it (see erofsctl status)", k))
	}
	if err != nil {
		return api.Usage{}, err
	}
	u := api.Usage{Disk: d.kernel.usage(k, ""), Blobs: []api.BlobUsage{}}
	if st, err := os.Stat(d.file(k, bootSuffix)); err == nil {
		u.Disk += st.Size()
	}
	for _, id := range rec.Blobs {
		n := d.kernel.usage(k, id)
		u.Blobs = append(u.Blobs, api.BlobUsage{ID: id, Disk: n})
		u.Disk += n
	}
	if img := d.openImageOf(k); img != nil {
		for _, v := range img.devices {
			s := v.blob.Stats()
			u.Present += s.Present
			u.Total += s.Needed
		}
	}
	return u, nil
}

// openImageOf returns the image of k if it is open, else nil.
func (d *Daemon) openImageOf(k imageKey) *image {
	d.mu.Lock()
	img := d.images[k]
	d.mu.Unlock()
	if img == nil || !img.isOpen() {
		return nil
	}
	return img
}

// Cache returns what the cache takes.
func (d *Daemon) Cache(context.Context) (api.Cache, error) {
	all, err := d.listKept()
	if err != nil {
		return api.Cache{}, err
	}
	return api.Cache{Bytes: d.usage(all), High: d.o.High, Low: d.o.Low, Images: len(all)}, nil
}

// Evict makes room in the cache.
func (d *Daemon) Evict(ctx context.Context, r api.EvictRequest) (api.Cache, error) {
	if r.Target < 0 {
		return api.Cache{}, api.BadRequest(fmt.Errorf("evict: target of %d bytes, want 0 at least", r.Target))
	}
	if err := d.evict(ctx, r.Target, r.Target); err != nil && !errors.Is(err, errNoRoom) {
		return api.Cache{}, fmt.Errorf("evict: %w", err)
	}
	return d.Cache(ctx)
}

// Version returns what runs.
func (d *Daemon) Version(context.Context) (api.VersionInfo, error) {
	v := BuildVersion()
	return api.VersionInfo{
		Version: v.Version, Commit: v.Commit, Go: runtime.Version(), Transport: d.kernel.name(), PID: os.Getpid(),
	}, nil
}

// Health is an error when nobody answers the kernel.
func (d *Daemon) Health(context.Context) error {
	if !d.serving.Load() {
		return api.Unavailable(errors.New("the kernel is not served"))
	}
	return nil
}
