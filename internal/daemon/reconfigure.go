package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/config"
)

// calls reports whether id, in one of the forms that clients use, means the image k whose
// configuration is called name: a snapshotter's with a slash before, or "/" for all.
func calls(id string, k imageKey, name string) bool {
	if id == "/" {
		return true
	}
	id = strings.TrimPrefix(id, "/")
	return id != "" && (id == k.id || id == name || id == k.kernelDomain()+"/"+k.id || id == k.domain && k.domain != "")
}

// Config returns what SetConfig was told.
func (c *Control) Config(id string) (map[string]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]string{}
	for of, values := range c.values {
		for key, v := range values {
			switch {
			case id == "":
				out[of+":"+key] = v
			case id == of:
				out[key] = v
			}
		}
	}
	return out, nil
}

// maxConfigs bounds the ids that SetConfig remembers.
const maxConfigs = 4096

// SetConfig changes credentials or proxy of the images that id means, and of those that
// are bound later without any.
func (c *Control) SetConfig(ctx context.Context, id string, values map[string]string) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	c.mu.Lock()
	if c.values[id] == nil && len(c.values) >= maxConfigs {
		c.mu.Unlock()
		return nydus.Invalid(fmt.Errorf("configurations of %d ids are remembered already", maxConfigs))
	}
	all := maps.Clone(c.values[id])
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, values)
	c.values[id] = all
	known := maps.Clone(c.values)
	c.mu.Unlock()
	return errors.Join(d.reconfigure(ctx, id, values), c.o.Holder.putJSON(ctx, heldValues, known))
}

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
	mounted := map[*image]config.Image{} // with what they get
	for k, img := range d.images {
		if img.src != nil && img.src.config != nil && d.bindings[k] == nil && calls(id, k, img.src.config.ID) {
			mounted[img] = withValues(*img.src.config, values)
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
	for img, c := range mounted {
		errs = append(errs, d.remount(ctx, img, c))
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
	img := d.swap(b, &src, c)
	d.mu.Unlock()
	old.close()
	if err := d.holdBinding(ctx, b); err != nil || img == nil {
		return err
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
	if err := d.holdImage(ctx, img); err != nil {
		return err
	}
	return d.addSource(ctx, img, &src)
}

// errEnded says that a binding has ended meanwhile.
var errEnded = errors.New("the binding has ended")

// rebind gives old the configuration of b, which is the same image. It is errEnded when
// the kernel let go of old, which was unbound, just now.
func (d *Daemon) rebind(ctx context.Context, old, b *binding) error {
	d.mu.Lock()
	if d.bindings[old.key] != old {
		d.mu.Unlock()
		return errEnded
	}
	if old.digest != b.digest {
		d.mu.Unlock()
		return errOtherBootstrap
	}
	before := old.src
	changed := old.left || !old.config.Equal(b.config)
	old.left = false
	var img *image
	if changed {
		img = d.swap(old, b.src, b.config)
		b.src = before // b's end closes it
	}
	now := old.src
	d.mu.Unlock()
	if img == nil {
		return nil
	}
	d.log.Info("bound again: its data come from elsewhere, or with other credentials", "image", old.key.id)
	return d.addSource(ctx, img, now)
}

// swap makes src and c what counts for b and returns b's image, whoever opened it, nil if
// it is not open: who is about to open it looks again then. The caller holds d.mu.
func (d *Daemon) swap(b *binding, src *source, c config.Image) *image {
	b.config, b.src, b.err = c, src, nil
	if b.stop != nil {
		b.stop() // whoever opens it with the old source tries again
	}
	if img := d.images[b.key]; img != nil && img.isOpen() {
		return img
	}
	return nil
}

// upToDate sees to it that img, which was opened with src, has the source that counts for
// its binding by now.
func (d *Daemon) upToDate(ctx context.Context, img *image, src *source) error {
	d.mu.Lock()
	b := d.bindings[img.key]
	if b == nil || b.src.store == src.store {
		d.mu.Unlock()
		return nil
	}
	now := b.src
	d.mu.Unlock()
	return d.addSource(ctx, img, now)
}

// addSource makes src the first place where img's blobs are read from.
func (d *Daemon) addSource(ctx context.Context, img *image, src *source) error {
	st, err := img.boot.Stat()
	if errors.Is(err, os.ErrClosed) {
		return nil // it is closed by now
	}
	if err != nil {
		return err
	}
	m, err := erofs.Open(img.boot, st.Size()) // it was admitted
	if err != nil {
		return err
	}
	entries, digests, err := imageBlobs(m)
	if err != nil {
		return err
	}
	for i, e := range entries {
		b, err := d.blobs.Open(ctx, src.blob(e, digests[uint32(i)]))
		if err != nil {
			return fmt.Errorf("blob %s: %w", e.ID, err)
		}
		if err := b.Close(); err != nil { // the image has it open: only the source is new
			return err
		}
	}
	return nil
}
