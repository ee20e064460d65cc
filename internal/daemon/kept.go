package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// A kept is an image of which something is on disk.
type kept struct {
	key imageKey
	record
	used time.Time
	open bool // mounted, or still in use by the kernel
}

// listKept returns all images that are kept, the least recently used first.
func (d *Daemon) listKept() ([]kept, error) {
	entries, err := os.ReadDir(filepath.Join(d.o.Root, "images"))
	if err != nil {
		return nil, fmt.Errorf("list kept images: %w", err)
	}
	var all []kept
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		k := kept{key: parseImageKey(name)}
		info, err := e.Info()
		if err == nil {
			k.used = info.ModTime()
			k.record, err = d.readRecord(k.key)
		}
		if errors.Is(err, fs.ErrNotExist) { // removed meanwhile
			continue
		}
		if err != nil {
			d.log.Warn("the record of an image is damaged; it is as good as removed", "image", k.key.id, "err", err)
		}
		all = append(all, k)
	}
	claimed, err := d.claimed()
	if err != nil {
		return nil, fmt.Errorf("list kept images: %w", err)
	}
	d.mu.Lock()
	for i := range all {
		all[i].open = d.usedLocked(all[i].key) || claimed[all[i].key]
	}
	d.mu.Unlock()
	slices.SortFunc(all, func(a, b kept) int { return cmp.Or(a.used.Compare(b.used), compareKeys(a.key, b.key)) })
	return all, nil
}

// usedLocked reports whether k is open, bound, or about to be. The caller holds d.mu.
func (d *Daemon) usedLocked(k imageKey) bool {
	return d.images[k] != nil || d.bindings[k] != nil || d.placed == k
}

// claimed returns images that are in use whatever the tables say: what is mounted, and until
// they are taken over those that a predecessor had open.
func (d *Daemon) claimed() (map[imageKey]bool, error) {
	mounts, err := d.ownMounts()
	if err != nil {
		return nil, err
	}
	out := map[imageKey]bool{}
	for _, m := range mounts {
		out[m.key] = true
	}
	select {
	case <-d.adopted:
	default:
		for _, k := range d.before {
			out[k] = true
		}
	}
	return out, nil
}

// Remove removes a kept image: its bootstrap, and those of its blobs that no other
// image of its domain has. One that is mounted, or used though it is not, is a conflict.
func (d *Daemon) Remove(ctx context.Context, r api.RemoveRequest) error {
	d.reap()
	domain := ownDomain(r.DomainID)
	all, err := d.listKept()
	if err != nil {
		return err
	}
	found := false
	for _, k := range all {
		if k.key.domain != domain || k.key.id != r.Image && k.Label != r.Image {
			continue
		}
		found = true
		if k.open && !d.letGo(ctx, k.key) {
			return api.Conflict(fmt.Errorf("remove image %s: it is in use; unmount it first (see erofsctl status)", r.Image))
		}
		err := untilSettled(ctx, func() error { return d.removeKept(ctx, k) })
		if errors.Is(err, cachefiles.ErrInUse) {
			err = api.Conflict(err)
		}
		if err != nil {
			return fmt.Errorf("remove image %s: %w", r.Image, err)
		}
		d.log.Info("removed", "image", k.key.id)
	}
	if !found {
		return api.NotFound(fmt.Errorf("remove image %s: nothing is kept of it (see erofsctl status)", r.Image))
	}
	return nil
}

// settleTime is how long the kernel may take to put a file in order that it has closed.
const settleTime = 2 * time.Second

// untilSettled does something once more as long as the kernel is not done with a file, for
// settleTime; then the error is cachefiles.ErrInUse.
func untilSettled(ctx context.Context, do func() error) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for {
		err := do()
		if !errors.Is(err, cachefiles.ErrInUse) {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// letGo waits a little for the kernel to let go of an image that has just been unmounted.
// It returns false at once for one that is mounted or bound.
func (d *Daemon) letGo(ctx context.Context, k imageKey) bool {
	return untilSettled(ctx, func() error {
		d.mu.Lock()
		defer d.mu.Unlock()
		switch img := d.images[k]; {
		case !d.usedLocked(k):
			return nil
		case img == nil || img.refs > 0 || d.bindings[k] != nil || d.placed == k:
			return errors.New("it is in use here")
		}
		return cachefiles.ErrInUse
	}) == nil
}

// removeKept removes k, which is not open. An image that is mounted meanwhile keeps its
// blobs.
func (d *Daemon) removeKept(ctx context.Context, k kept) error {
	if err := d.removing.take(ctx); err != nil {
		return err
	}
	defer d.removing.give()
	all, err := d.listKept()
	if err != nil {
		return err
	}
	shared := map[string]bool{} // blobs and layers of other images
	last := true
	for _, o := range all {
		if o.key == k.key {
			if o.open {
				return errors.New("it has been mounted meanwhile")
			}
			continue
		}
		shared[o.Layer] = true
		if o.key.domain == k.key.domain {
			last = false
			for _, b := range o.Blobs {
				shared[b] = true
			}
		}
	}
	failpoint.Hit("daemon.remove")
	var errs []error
	for _, b := range k.Blobs {
		if !shared[b] {
			errs = append(errs, d.removeBlob(ctx, k.key, b))
		}
	}
	errs = append(errs, d.kernel.discard(k.key, last))
	names := []string{d.file(k.key, bootSuffix), d.file(k.key, recordSuffix)}
	if k.Layer != "" && !shared[k.Layer] {
		names = append(names, filepath.Join(d.o.Root, "images", filepath.Base(k.Layer)))
	}
	if err := errors.Join(errs...); err != nil {
		return err // the record stays, so that it can be tried again
	}
	return d.removeFiles(k.key, names)
}

// removeFiles removes what an image has in root/images, unless it is being opened or
// bound: then they are that image's by now.
func (d *Daemon) removeFiles(k imageKey, names []string) error {
	d.mu.Lock()
	defer d.mu.Unlock() // over a few unlinks
	if d.usedLocked(k) {
		return nil
	}
	var errs []error
	for _, name := range names {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeBlob removes a blob of k from the cache, unless an image has opened it since.
func (d *Daemon) removeBlob(ctx context.Context, k imageKey, id string) error {
	if err := d.kernel.discardBlob(k, id); err != nil {
		return err
	}
	if err := d.blobs.Forget(ctx, k.domain, id); err != nil && !errors.Is(err, blobmgr.ErrOpen) {
		return err
	}
	return nil
}

// usage returns how many bytes of disk the images take; what they share counts once.
func (d *Daemon) usage(all []kept) int64 {
	counted := map[imageKey]bool{} // a domain and a blob
	n := int64(0)
	for _, k := range all {
		n += d.kernel.usage(k.key, "")
		for _, b := range k.Blobs {
			if key := (imageKey{k.key.domain, b}); !counted[key] {
				counted[key] = true
				n += d.kernel.usage(k.key, b)
			}
		}
	}
	return n
}

// errNoRoom says that a cache is as small as it can be made.
var errNoRoom = errors.New("all that is left is mounted, bound or pinned")

// evict removes images that are neither used nor pinned when the cache takes more than
// high bytes, until it takes no more than low.
func (d *Daemon) evict(ctx context.Context, high, low int64) error {
	all, err := d.listKept()
	if err != nil {
		return err
	}
	n := d.usage(all)
	if n <= high {
		return nil
	}
	if n = d.dropLeft(all, n); n <= low {
		return nil
	}
	for i, k := range all {
		if k.open || k.Pinned {
			continue
		}
		if err := d.removeKept(ctx, k); err != nil {
			d.log.Warn("cannot remove an image from the full cache", "image", k.key.id, "err", err)
			continue
		}
		all[i] = kept{key: k.key}
		before := n
		n = d.usage(all)
		d.log.Info("removed an image from the full cache", "image", k.key.id, "bytes", before-n)
		if n <= low {
			return nil
		}
	}
	return fmt.Errorf("it takes %d bytes, more than its low mark of %d: %w", n, low, errNoRoom)
}

// exists reports whether there may be a file of that name.
func exists(name string) bool {
	_, err := os.Lstat(name)
	return !errors.Is(err, fs.ErrNotExist)
}
