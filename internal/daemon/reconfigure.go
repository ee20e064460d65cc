package daemon

import (
	"context"
	"errors"
	"fmt"

	"github.com/erofsd/erofsd/internal/config"
)

// withValues returns c with what nydus's API calls registry_auth, proxy_url and
// dragonfly_scheduler_endpoint.
func withValues(c config.Image, values map[string]string) config.Image {
	b := c.Backend
	var h *config.HTTP
	switch {
	case b.Registry != nil:
		r := *b.Registry
		b.Registry, h = &r, &r.HTTP
		if auth, ok := values["registry_auth"]; ok {
			r.Auth, r.Token = config.Secret(auth), ""
		}
	case b.S3 != nil:
		s := *b.S3
		b.S3, h = &s, &s.HTTP
	case b.OSS != nil:
		s := *b.OSS
		b.OSS, h = &s, &s.HTTP
	case b.HTTPProxy != nil:
		p := *b.HTTPProxy
		b.HTTPProxy, h = &p, &p.HTTP
	}
	if h != nil {
		if url, ok := values["proxy_url"]; ok {
			h.Proxy.URL = url
		}
		if endpoint, ok := values["dragonfly_scheduler_endpoint"]; ok {
			h.Proxy.DragonflyScheduler = endpoint
		}
	}
	c.Backend = b
	return c
}

// reconfigure changes where the images that id means get their data.
func (d *Daemon) reconfigure(ctx context.Context, id string, values map[string]string) error {
	if err := d.placing.take(ctx); err != nil {
		return err
	}
	defer d.placing.give()
	d.mu.Lock()
	var bound []*binding
	for k, b := range d.bindings {
		if calls(id, k, b.config.ID) {
			bound = append(bound, b)
		}
	}
	var mounted []*image
	for k, img := range d.images {
		if img.src != nil && img.src.config != nil && d.bindings[k] == nil && calls(id, k, img.src.config.ID) {
			mounted = append(mounted, img)
		}
	}
	d.mu.Unlock()
	var errs []error
	for _, b := range bound {
		d.mu.Lock()
		c := withValues(b.config, values)
		d.mu.Unlock()
		errs = append(errs, d.resource(ctx, b, c))
	}
	for _, img := range mounted {
		errs = append(errs, d.remount(ctx, img, withValues(*img.src.config, values)))
	}
	return errors.Join(errs...)
}

// resource makes c the configuration of b.
func (d *Daemon) resource(ctx context.Context, b *binding, c config.Image) error {
	origin, err := d.stores.image(c)
	if err != nil {
		return fmt.Errorf("image %s: %w", b.key.id, err)
	}
	d.mu.Lock()
	src := *b.src
	old := b.src.origin
	src.origin, src.config = origin, &c
	img := b.swap(&src, c)
	d.mu.Unlock()
	old.close()
	if img == nil {
		return nil
	}
	return d.addSource(ctx, img, &src)
}

// remount makes c the configuration of an image that was mounted with one.
func (d *Daemon) remount(ctx context.Context, img *image, c config.Image) error {
	select {
	case <-img.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	if img.err != nil {
		return nil // it is gone
	}
	origin, err := d.stores.image(c)
	if err != nil {
		return fmt.Errorf("image %s: %w", img.key.id, err)
	}
	d.mu.Lock()
	src := *img.src
	old := img.src.origin
	src.origin, src.config = origin, &c
	img.src = &src
	d.mu.Unlock()
	old.close()
	return d.addSource(ctx, img, &src)
}
