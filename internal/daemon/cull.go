package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/api"
)

// Pauses between attempts to cull what is still in use.
const (
	cullPause    = 50 * time.Millisecond
	cullMaxPause = 2 * time.Second
)

// Cull removes what the cache has of the blob or bootstrap id, in every domain. What the
// kernel still has though nobody has bound or mounted it goes as soon as it can; what is
// mounted, or bound and in use, is an api.Conflict. What is not there is no error.
func (d *Daemon) Cull(ctx context.Context, id string) error {
	d.reap()
	if err := cachefiles.ValidateID(id); err != nil {
		return api.BadRequest(err)
	}
	d.log.Info("try to cull blob " + id)
	err := d.cull(ctx, id)
	if err == nil || !errors.Is(err, cachefiles.ErrInUse) && !errors.Is(err, errStillOpen) {
		return err
	}
	if user := d.userOf(id); user != "" {
		return api.Conflict(fmt.Errorf("blob %s is in use by image %s: %w", id, user, err))
	}
	d.mu.Lock()
	_, waits := d.culls[id]
	d.culls[id] = struct{}{}
	d.mu.Unlock()
	if !waits {
		d.background.Go(func() { d.cullLater(id) })
	}
	return nil
}

// errStillOpen says that something belongs to an image that is not closed yet.
var errStillOpen = errors.New("an image that has it is not closed yet")

// userOf returns an image that is mounted or bound and has the blob or bootstrap id, ""
// if there is none.
func (d *Daemon) userOf(id string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	for k, b := range d.bindings {
		if !b.left && (k.id == id || slices.Contains(b.src.record.Blobs, id)) {
			return k.String()
		}
	}
	for _, m := range d.mounts {
		if m.img != nil && (m.img.key.id == id || m.img.has(id)) {
			return m.img.key.String()
		}
	}
	return ""
}

// has reports whether a blob of img is called id. It is open.
func (img *image) has(id string) bool {
	return slices.ContainsFunc(img.devices, func(v *device) bool { return v.id == id })
}

// cullLater culls id when nobody uses it any more, unless it is wanted again.
func (d *Daemon) cullLater(id string) {
	defer func() {
		d.mu.Lock()
		delete(d.culls, id)
		d.mu.Unlock()
	}()
	for pause := cullPause; ; pause = min(2*pause, cullMaxPause) {
		select {
		case <-time.After(pause):
		case <-d.ctx.Done():
			return
		}
		if d.userOf(id) != "" {
			return
		}
		err := d.cull(d.ctx, id)
		if errors.Is(err, cachefiles.ErrInUse) || errors.Is(err, errStillOpen) {
			continue
		}
		if err != nil {
			d.log.Warn("remove a blob from the cache", "blob", id, "err", err)
		}
		return
	}
}

// cull is one attempt.
func (d *Daemon) cull(ctx context.Context, id string) error {
	if err := d.removing.take(ctx); err != nil {
		return err
	}
	defer d.removing.give()
	all, err := d.listKept()
	if err != nil {
		return err
	}
	var errs []error
	for _, k := range all {
		if k.key.id == id {
			errs = append(errs, d.cullBootstrap(k))
		}
		if slices.Contains(k.Blobs, id) {
			errs = append(errs, d.cullBlob(ctx, k, id))
		}
	}
	errs = append(errs, d.kernel.discardEverywhere(id))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return d.prune(all)
}

// cullBootstrap removes k's bootstrap; its record stays for its blobs.
func (d *Daemon) cullBootstrap(k kept) error {
	if err := d.kernel.discardBlob(k.key, k.key.id); err != nil {
		return err
	}
	if k.open {
		d.mu.Lock()
		defer d.mu.Unlock()
		if b := d.bindings[k.key]; b != nil && !b.left && d.images[k.key] == nil {
			return nil // bound, not mounted: the kernel gets it again
		}
		return errStillOpen
	}
	return d.removeFiles(k.key, []string{d.file(k.key, bootSuffix)})
}

// cullBlob removes a blob of k.
func (d *Daemon) cullBlob(ctx context.Context, k kept, id string) error {
	if err := d.kernel.discardBlob(k.key, id); err != nil {
		return err
	}
	err := d.blobs.Forget(ctx, k.key.domain, id)
	if errors.Is(err, blobmgr.ErrOpen) {
		return errStillOpen
	}
	return err
}

// prune removes the records of images of which nothing is left, and with the last of a
// domain what the kernel made for that.
func (d *Daemon) prune(all []kept) error {
	var errs []error
	for i, k := range all {
		if k.open || exists(d.file(k.key, bootSuffix)) || slices.ContainsFunc(k.Blobs, func(id string) bool {
			return d.blobs.Kept(k.key.domain, id) || d.kernel.usage(k.key, id) > 0
		}) {
			continue
		}
		last := !slices.ContainsFunc(all, func(o kept) bool { return o.key != k.key && o.key.domain == k.key.domain })
		errs = append(errs, d.kernel.discard(k.key, last), d.removeFiles(k.key, []string{d.file(k.key, recordSuffix)}))
		all[i].key = imageKey{}
	}
	return errors.Join(errs...)
}
