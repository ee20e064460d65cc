package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/config"
)

// A binding is an image that somebody made known under names of their own, and mounts
// when and how they like. Binding asks no backend: the blobs are opened when the kernel
// wants them.
//
// It is in Daemon.bindings until it was unbound and the kernel does not need it any more;
// meanwhile it can be bound again.
type binding struct {
	key    imageKey
	digest string // of the bootstrap
	boot   *bootFile
	blobs  []chunk.Entry // one for each slot

	opening turn               // serialises attempts to open the image
	opened  atomic.Bool        // img is set, and has the current source
	ctx     context.Context    // ends with the binding
	cancel  context.CancelFunc // of ctx

	// What follows is guarded by Daemon.mu.
	config config.Image
	src    *source
	img    *image             // nil until opened
	stop   context.CancelFunc // of the attempt that is under way, nil if none is
	err    error              // of the last attempt
	failed time.Time          // when that was
	left   bool               // unbound, but still in use
}

// maxBoundName bounds the names of a bound image together, in bytes: they are a part of
// the names of files.
const maxBoundName = 200

// A boundImage is what Bind makes known.
type boundImage struct {
	key       imageKey
	bootstrap string // path
	config    config.Image
	pinned    bool
}

// Bind makes an image known. The same again is success, and what is new in where its data
// come from, credentials above all, counts from then on. The error is an api.Conflict
// when another bootstrap has the name, as long as that is bound or in use.
func (d *Daemon) Bind(ctx context.Context, r boundImage) error {
	if err := validateBound(r.key); err != nil {
		return api.BadRequest(err)
	}
	f, err := openRegular(r.bootstrap)
	if err != nil {
		return err
	}
	defer f.Close()
	tmp, sum, err := d.copyBootstrap(f)
	if err != nil {
		return err
	}
	defer os.Remove(tmp) // it is gone when it was taken
	b, err := newBinding(ctx, r, tmp, sum)
	if err != nil {
		return err
	}
	if err := d.setSource(b, r); err != nil {
		return errors.Join(err, b.boot.f.Close())
	}
	if err := d.placing.take(ctx); err != nil {
		return errors.Join(err, b.close())
	}
	defer d.placing.give()
	if old := d.bound(b.key); old != nil {
		err := d.rebind(ctx, old, b)
		if err == nil {
			err = d.holdBinding(ctx, old)
		}
		if !errors.Is(err, errEnded) {
			return errors.Join(err, b.close())
		}
	}
	if err := d.register(ctx, b, tmp); err != nil {
		return errors.Join(fmt.Errorf("bind image %s: %w", b.key, err), b.close())
	}
	d.log.Info("bound", "image", b.key.id, "domain", b.key.domain)
	return d.holdBinding(ctx, b)
}

func validateBound(k imageKey) error {
	if err := cachefiles.ValidateID(k.id); err != nil {
		return err
	}
	if n := len(k.domain) + len(k.id); len(k.domain) > maxDomain || n > maxBoundName {
		return fmt.Errorf("the names of image and domain have %d and %d bytes, at most %d together and %d for the domain are allowed",
			len(k.id), len(k.domain), maxBoundName, maxDomain)
	}
	if k.domain == "" {
		return nil
	}
	return cachefiles.ValidateID(k.domain)
}

// newBinding examines the bootstrap in the file tmp.
func newBinding(ctx context.Context, r boundImage, tmp, sum string) (*binding, error) {
	f, err := os.Open(tmp)
	if err != nil {
		return nil, fmt.Errorf("open bootstrap: %w", err)
	}
	m, size, err := openImage(ctx, f)
	b := &binding{key: r.key, digest: sum, opening: make(turn, 1)}
	if err == nil {
		b.blobs, err = blobEntries(m)
	}
	if err != nil {
		return nil, errors.Join(api.BadRequest(fmt.Errorf("refuse image %s: %w", r.bootstrap, err)), f.Close())
	}
	b.boot = newBootFile(f, size)
	return b, nil
}

// setSource makes b's source from its configuration.
func (d *Daemon) setSource(b *binding, r boundImage) error {
	origin, err := d.stores.image(r.config)
	if err != nil {
		return api.BadRequest(err)
	}
	b.ctx, b.cancel = context.WithCancel(d.ctx)
	b.config = r.config
	b.src = &source{
		key: b.key, digest: b.digest, boot: d.file(b.key, bootSuffix), label: r.bootstrap, origin: origin, config: &r.config,
		record: record{Label: r.bootstrap, Digest: b.digest, Pinned: r.pinned, Sizes: map[string]int64{}},
	}
	for _, e := range b.blobs {
		b.src.record.Blobs = append(b.src.record.Blobs, e.ID)
	}
	return nil
}

// close frees what only b has.
func (b *binding) close() error {
	b.cancel()
	b.src.origin.close()
	return b.boot.f.Close()
}

// bound returns the binding of k, nil if there is none.
func (d *Daemon) bound(k imageKey) *binding {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bindings[k]
}

// register makes b, with the bootstrap in the file tmp, known to the kernel. The caller
// has the turn d.placing. Nobody removes b's files from when it looks at them until b is
// in the table.
func (d *Daemon) register(ctx context.Context, b *binding, tmp string) error {
	d.mu.Lock()
	d.placed = b.key
	img := d.images[b.key]
	d.mu.Unlock()
	err := d.settle(ctx, b, img, tmp)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.placed = imageKey{}
	if err == nil {
		d.bindings[b.key] = b
		d.kernel.bind(b)
	}
	return err
}

// settle puts b's files where they belong. img is the image that has b's name already,
// nil if none does.
func (d *Daemon) settle(ctx context.Context, b *binding, img *image, tmp string) error {
	if img != nil {
		select {
		case <-img.ready:
		case <-ctx.Done():
			return ctx.Err()
		}
		if img.err == nil && img.digest != b.digest {
			return errOtherBootstrap
		}
	}
	b.src.record.Pinned = b.src.record.Pinned || d.pinned(b.key, b.digest)
	if img == nil || img.err != nil {
		if err := d.install(ctx, b, tmp); err != nil {
			return err
		}
	}
	return d.writeRecordFile(b.key, b.src.record)
}

// errOtherBootstrap says that a name is taken.
var errOtherBootstrap = api.Conflict(errors.New("another bootstrap has this name; unbind and unmount that first"))

// install puts b's bootstrap where it belongs, and removes what the kernel's cache has of
// another one, and of blobs of which nothing is known: nobody can say which digests those
// were checked against.
func (d *Daemon) install(ctx context.Context, b *binding, tmp string) error {
	r, err := d.readRecord(b.key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn("the record of an image is damaged", "image", b.key.id, "err", err)
	}
	if err != nil || r.digest(b.key) != b.digest {
		if err := d.kernel.discardBlob(b.key, b.key.id); err != nil {
			return errors.Join(errOtherBootstrap, err)
		}
		if err := d.disown(ctx, b, r.Blobs); err != nil {
			return err
		}
	}
	for _, e := range b.blobs {
		if d.blobs.Known(b.key.domain, e.ID) {
			continue
		}
		if err := d.kernel.discardBlob(b.key, e.ID); err != nil {
			return fmt.Errorf("remove what an unknown daemon left of blob %s: %w", e.ID, err)
		}
	}
	return os.Rename(tmp, d.file(b.key, bootSuffix))
}

// disown removes blobs of the image whose name b takes, except those that b or another
// image has: no record would tell of them any more.
func (d *Daemon) disown(ctx context.Context, b *binding, blobs []string) error {
	if len(blobs) == 0 {
		return nil
	}
	if err := d.removing.take(ctx); err != nil {
		return err
	}
	defer d.removing.give()
	all, err := d.listKept()
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, e := range b.blobs {
		keep[e.ID] = true
	}
	for _, k := range all {
		if k.key.domain == b.key.domain && k.key != b.key {
			for _, id := range k.Blobs {
				keep[id] = true
			}
		}
	}
	for _, id := range blobs {
		if keep[id] {
			continue
		}
		if err := d.removeBlob(ctx, b.key, id); err != nil {
			return fmt.Errorf("remove blob %s of an earlier image of this name: %w", id, err)
		}
	}
	return nil
}

// Unbind forgets the image k, or with an empty id all of k's domain. Images that are
// mounted or used are served on. The error is an api.NotFound when there is none of
// that id.
func (d *Daemon) Unbind(k imageKey) error {
	var gone []*binding
	d.mu.Lock()
	for key, b := range d.bindings {
		if key.domain == k.domain && (k.id == "" || key.id == k.id) && !b.left {
			b.left = true
			gone = append(gone, b)
		}
	}
	d.mu.Unlock()
	if len(gone) == 0 && k.id != "" {
		return api.NotFound(fmt.Errorf("unbind image %s: it is not bound", k))
	}
	for _, b := range gone {
		d.log.Info("unbound", "image", b.key.id, "domain", b.key.domain)
		d.leave(b)
	}
	return nil
}

// leave ends b if it was unbound and the kernel does not need it.
func (d *Daemon) leave(b *binding) {
	d.mu.Lock()
	if !b.left || d.bindings[b.key] != b || !d.kernel.unbind(b) {
		d.mu.Unlock()
		return
	}
	delete(d.bindings, b.key)
	b.cancel()
	img := b.img
	d.mu.Unlock()
	d.o.Holder.drop(heldBinding+b.key.String(), func() bool { return d.bound(b.key) != nil })
	if img != nil {
		d.release(img)
	}
	if err := b.close(); err != nil {
		d.log.Warn("close bootstrap", "image", b.key.id, "err", err)
	}
	d.used(b.key)
}

// Bindings returns what is bound in domain, ordered by id.
func (d *Daemon) Bindings(domain string) []*binding {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []*binding
	for k, b := range d.bindings {
		if k.domain == domain && !b.left {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b *binding) int { return compareKeys(a.key, b.key) })
	return out
}
