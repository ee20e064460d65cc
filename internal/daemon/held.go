package daemon

import (
	"context"
	"encoding/json"
	"path/filepath"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/internal/config"
	"github.com/erofsd/erofsd/internal/keeper"
)

// This file is what the keeper holds of images.

// holdImage has the keeper hold what the next worker needs to open img again: a record
// has no credentials.
func (d *Daemon) holdImage(ctx context.Context, img *image) error {
	d.mu.Lock()
	src := img.src
	d.mu.Unlock()
	saved, err := saveImage(img.key, src, src.config, false)
	if err != nil {
		return err
	}
	return d.o.Holder.putJSON(ctx, heldImage+img.key.String(), saved)
}

// holdBinding is holdImage of a bound image.
func (d *Daemon) holdBinding(ctx context.Context, b *binding) error {
	d.mu.Lock()
	src, c := b.src, b.config
	d.mu.Unlock()
	saved, err := saveImage(b.key, src, &c, true)
	if err != nil {
		return err
	}
	return d.o.Holder.putJSON(ctx, heldBinding+b.key.String(), saved)
}

// remember reads what a predecessor left of the images that it had open.
func (d *Daemon) remember() {
	for name, e := range d.o.Holder.takeAll(heldImage) {
		k := parseImageKey(name)
		d.before = append(d.before, k)
		entry, err := configured(e)
		if err != nil {
			d.log.Error("what the last worker knew of an image is lost; it is opened by its record, without credentials", "image", k.id, "err", err)
		}
		if entry != nil {
			d.remembered[k] = entry.Image
		}
	}
}

// configured returns the configuration in an image's entry, nil if there is none.
func configured(e keeper.Entry) (*config.BlobEntry, error) {
	var saved savedImage
	if err := json.Unmarshal(e.Data, &saved); err != nil || len(saved.Entry) == 0 {
		return nil, err
	}
	entry, _, err := config.ParseBlobEntry(saved.Entry)
	return &entry, err
}

// cacheName is b's name in the cache.
func cacheName(b *blobmgr.Blob) string { return filepath.Base(b.Path()) }

// putBlob has the keeper hold b's file.
func (h *Holder) putBlob(ctx context.Context, b *blobmgr.Blob) error {
	return h.put(ctx, heldBlob+cacheName(b), nil, b.File())
}

// bindHeld binds what a predecessor had bound.
func (c *Control) bindHeld(ctx context.Context) {
	h := c.o.Holder
	if e := h.take(heldValues); e.Data != nil {
		if err := json.Unmarshal(e.Data, &c.values); err != nil {
			c.log.Error("what the API configured before is lost; configure it again", "err", err)
		}
	}
	for name, held := range h.takeAll(heldBinding) {
		var saved savedImage
		err := json.Unmarshal(held.Data, &saved)
		if err == nil {
			err = c.bindSaved(ctx, c.daemon, saved)
		}
		if err != nil {
			c.log.Error("an image that was bound before cannot be bound again; what it lacks reads as EIO", "image", name, "err", err)
		}
	}
}
