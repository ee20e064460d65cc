package daemon

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/http"
	"os"
	"slices"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/config"
)

// entryKey is the key of an image that nydus's API calls so. Without a domain the kernel
// takes the fsid for it.
func entryKey(domain, id string) imageKey { return imageKey{ownDomain(cmp.Or(domain, id)), id} }

// PutBlob binds the image that entry describes.
func (c *Control) PutBlob(ctx context.Context, entry []byte) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	e, warnings, err := config.ParseBlobEntry(entry)
	var parse *config.ParseError
	var request *config.RequestError
	switch {
	case errors.As(err, &parse):
		return nydus.ParseBody(parse.Message, parse.Line, parse.Column)
	case errors.As(err, &request):
		return nydus.BadRequest(err)
	case err != nil:
		return nydus.Invalid(err)
	}
	for _, w := range warnings {
		c.log.Debug("configuration of an image", "image", e.ID, "warning", w)
	}
	if exists(e.Bootstrap) && !usable(e.Image.WorkDir) {
		return nydus.IO(errors.New("cache_config.work_dir is no directory"))
	}
	err = c.bindEntry(ctx, d, e)
	if e := (*api.Error)(nil); errors.As(err, &e) {
		if e.Status == http.StatusConflict {
			return nydus.Exists(err)
		}
		return nydus.Invalid(err)
	}
	return err
}

// usable reports whether dir, which nydusd would keep its own files in, is a directory. We
// keep ours in one place; a mistake is worth to be told all the same.
func usable(dir string) bool {
	st, err := os.Stat(dir)
	return dir == "" || err == nil && st.IsDir()
}

// bindEntry binds the image of e, with what SetConfig said of it.
func (c *Control) bindEntry(ctx context.Context, d *Daemon, e config.BlobEntry) error {
	return c.bindAs(ctx, d, entryKey(e.DomainID, e.ID), e, false)
}

// bindSaved binds an image that an earlier daemon had bound, in its domain: that may be
// ours, which nydus's API cannot name.
func (c *Control) bindSaved(ctx context.Context, d *Daemon, s savedImage) error {
	e, _, err := config.ParseBlobEntry(s.Entry)
	if err != nil {
		return err
	}
	return c.bindAs(ctx, d, imageKey{e.DomainID, e.ID}, e, s.Pinned)
}

func (c *Control) bindAs(ctx context.Context, d *Daemon, k imageKey, e config.BlobEntry, pinned bool) error {
	c.mu.Lock()
	for id, values := range c.values {
		if r := e.Image.Backend.Registry; calls(id, k, e.Image.ID) && r != nil && r.Auth == "" && r.Token == "" {
			e.Image = withValues(e.Image, values)
		}
	}
	c.mu.Unlock()
	return d.Bind(ctx, boundImage{key: k, bootstrap: d.copyOf(k, e.Bootstrap), config: e.Image, pinned: pinned})
}

// copyOf returns the daemon's own copy of k's bootstrap if name is gone.
func (d *Daemon) copyOf(k imageKey, name string) string {
	if own := d.file(k, bootSuffix); !exists(name) && exists(own) {
		return own
	}
	return name
}

// Blobs lists the images that are bound in a domain, and their data blobs.
func (c *Control) Blobs(_ context.Context, domainID, blobID string) ([]nydus.BlobInfo, error) {
	d, err := c.running()
	if err != nil {
		return nil, err
	}
	out := []nydus.BlobInfo{}
	data := map[string]*nydus.BlobInfo{}
	for _, b := range d.Bindings(entryKey(domainID, blobID).domain) {
		info := nydus.BlobInfo{
			Type: nydus.BootstrapBlob, ID: b.key.id, DomainID: domainID, Size: b.boot.Size(),
			Allocated: d.kernel.usage(b.key, ""), Open: d.kernel.live(b.key, b.key.id), Blobs: []string{},
		}
		d.mu.Lock()
		info.ConfigID, info.Backend = b.config.ID, b.config.Backend.Type
		d.mu.Unlock()
		for _, e := range b.blobs {
			info.Blobs = append(info.Blobs, e.ID)
			if data[e.ID] == nil {
				data[e.ID] = &nydus.BlobInfo{
					Type: nydus.DataBlob, ID: e.ID, DomainID: domainID, Size: e.Size,
					Allocated: d.kernel.usage(b.key, e.ID), Open: d.kernel.live(b.key, e.ID),
				}
			}
			data[e.ID].Images++
		}
		out = append(out, info)
	}
	for _, id := range slices.Sorted(maps.Keys(data)) {
		out = append(out, *data[id])
	}
	return slices.DeleteFunc(out, func(b nydus.BlobInfo) bool { return blobID != "" && b.ID != blobID }), nil
}

// DeleteBlob unbinds an image, or all of a domain. A data blob belongs to its images:
// there is nothing to do for it.
func (c *Control) DeleteBlob(ctx context.Context, domainID, blobID string) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	if blobID == "" {
		if domainID == "" {
			return nil
		}
		return d.Unbind(imageKey{domain: ownDomain(domainID)})
	}
	if d.Unbind(entryKey(domainID, blobID)) == nil {
		return nil
	}
	known, err := c.Blobs(ctx, domainID, blobID)
	if err == nil && len(known) == 0 {
		err = nydus.NoEntry(blobID)
	}
	return err
}

// CullBlob removes what the cache has of a blob, at once or when the kernel lets it go.
func (c *Control) CullBlob(ctx context.Context, blobID string) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	if err := d.Cull(ctx, blobID); err != nil {
		return nydus.CullFailed(err)
	}
	return nil
}
