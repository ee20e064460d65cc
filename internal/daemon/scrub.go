package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/internal/api"
)

// Scrub verifies the blobs of kept images, or of all, and repairs what is wrong. What a
// container has read already stays in its page cache.
func (d *Daemon) Scrub(ctx context.Context, r api.ScrubRequest) (api.Scrub, error) {
	if r.Rate < 0 {
		return api.Scrub{}, api.BadRequest(fmt.Errorf("scrub: rate of %d bytes a second, want 0 at least", r.Rate))
	}
	o := blobmgr.ScrubOptions{Rate: r.Rate}
	if len(r.Images) > 0 {
		var err error
		if o.Domain, o.IDs, err = d.blobsOf(ownDomain(r.DomainID), r.Images); err != nil {
			return api.Scrub{}, err
		}
	}
	if t, ok := d.kernel.(*fanotifyTransport); ok {
		o.Reopen = t.reopen
	}
	s, err := d.blobs.Scrub(ctx, o)
	if errors.Is(err, blobmgr.ErrNoScrub) {
		return api.Scrub{}, api.Conflict(err)
	}
	d.log.Info("scrubbed", "blobs", s.Blobs, "bytes", s.Bytes, "wrong", s.Wrong, "unrepaired", s.Unrepaired)
	return api.Scrub{
		Blobs: s.Blobs, Chunks: s.Units, Bytes: s.Bytes, Wrong: s.Wrong, Repaired: s.Repaired, Unrepaired: s.Unrepaired, Errors: s.Errors,
	}, err
}

// blobsOf returns the blobs of kept images of a domain.
func (d *Daemon) blobsOf(domain string, images []string) (string, []string, error) {
	all, err := d.listKept()
	if err != nil {
		return "", nil, err
	}
	ids := map[string]bool{}
	for _, name := range images {
		found := false
		for _, k := range all {
			if k.key.domain == domain && (k.key.id == name || k.Label == name) {
				found = true
				for _, id := range k.Blobs {
					ids[id] = true
				}
			}
		}
		if !found {
			return "", nil, api.NotFound(fmt.Errorf("scrub image %s: nothing is kept of it (see erofsctl status)", name))
		}
	}
	return domain, slices.Sorted(maps.Keys(ids)), nil
}

// reopen makes the kernel ask for b again, which may be complete and without a mark, until
// it is complete and release was called.
func (t *fanotifyTransport) reopen(b *blobmgr.Blob) (release func(), err error) {
	t.d.mu.Lock()
	v := t.d.devices[b]
	t.d.mu.Unlock()
	if v == nil {
		return func() {}, nil // nothing is mounted with it
	}
	vs := []*device{v}
	if err := t.pin(t.d.ctx, vs); err != nil {
		return nil, fmt.Errorf("mark the cache file: %w", err)
	}
	return func() {
		for _, img := range t.d.imagesWith(v) {
			t.d.background.Go(func() { t.d.awaitDone(img, v) })
		}
		t.unpin(vs)
	}, nil
}

// imagesWith returns the open images that have v.
func (d *Daemon) imagesWith(v *device) (with []*image) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ctx.Err() != nil {
		return nil
	}
	for _, img := range d.images {
		if img.isOpen() && slices.Contains(img.devices, v) {
			with = append(with, img)
		}
	}
	return with
}
