package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// An image is an admitted bootstrap with its blobs open. Mounts of the same
// bootstrap share it.
type image struct {
	key     imageKey
	digest  string        // of the bootstrap
	ready   chan struct{} // closed when the fields below are set
	err     error         // of opening; the image is then gone from the table
	boot    *os.File      // private copy, complete, read-only
	devices []*device     // one per device slot, in slot order
	closed  chan struct{} // closed when the image is

	refs int     // mounts; guarded by Daemon.mu
	src  *source // where it came from last; guarded by Daemon.mu
}

// acquire returns the open image of src, opening it when it is the first.
// release gives it back.
func (d *Daemon) acquire(ctx context.Context, src *source) (*image, error) {
	for {
		img, first := d.lookup(src.key)
		if first {
			d.admit(ctx, img, src)
		}
		select {
		case <-img.ready:
		case <-ctx.Done():
			d.release(img)
			return nil, ctx.Err()
		}
		if errors.Is(img.err, context.Canceled) && ctx.Err() == nil {
			continue // the one who opened it left; we have not
		}
		if img.err == nil && img.digest != src.digest {
			d.release(img)
			return nil, errOtherBootstrap
		}
		return img, img.err // a failed image is in no table: nobody counts its references
	}
}

// lookup finds or adds the image of key and takes a reference; first says that the
// caller has to admit it.
func (d *Daemon) lookup(key imageKey) (img *image, first bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	img = d.images[key]
	if img == nil {
		first = true
		img = &image{key: key, ready: make(chan struct{}), closed: make(chan struct{})}
		d.images[key] = img
	}
	img.refs++
	return img, first
}

// admit opens img and tells those who wait for it.
func (d *Daemon) admit(ctx context.Context, img *image, src *source) {
	defer close(img.ready)
	if img.err = d.open(ctx, img, src); img.err != nil {
		d.mu.Lock()
		delete(d.images, img.key)
		d.mu.Unlock()
		return
	}
	for _, v := range img.devices {
		d.background.Go(func() { d.awaitDone(img, v) })
	}
}

// errRemoved says that somebody removed the image between its resolve and its open.
var errRemoved = errors.New("the image was removed meanwhile")

// open admits src's bootstrap and opens its blobs.
func (d *Daemon) open(ctx context.Context, img *image, src *source) (err error) {
	img.digest = src.digest
	img.boot, err = os.Open(src.boot)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", errRemoved, err)
	}
	if err != nil {
		return fmt.Errorf("open bootstrap: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.closeImage(img))
		}
	}()
	m, _, err := openImage(ctx, img.boot)
	if err != nil {
		return fmt.Errorf("refuse image %s: %w", src.label, err)
	}
	entries, digests, err := imageBlobs(m)
	if err != nil {
		return fmt.Errorf("refuse image %s: %w", src.label, err)
	}
	for i, e := range entries {
		b, err := d.blobs.Open(ctx, src.blob(e, digests[uint32(i)]))
		if err != nil {
			return fmt.Errorf("open blob %s of %s: %w", e.ID, src.label, err)
		}
		img.devices = append(img.devices, d.hold(e.ID, b))
	}
	if err := d.kernel.add(ctx, img); err != nil {
		return fmt.Errorf("open image %s: %w", src.label, err)
	}
	if err := d.writeRecord(img, src); err != nil {
		return err
	}
	failpoint.Hit("daemon.recorded")
	src.tables = nil // the cache has them by now
	d.mu.Lock()
	img.src = src
	d.mu.Unlock()
	if err := d.holdImage(ctx, img); err != nil {
		return err
	}
	d.background.Go(func() {
		d.hint(img, m)
		if src.prefetch.Mode == blobmgr.All {
			d.log.Info("fscache: start to prefetch data for image " + img.key.id)
			d.fetchTable(img, m)
		}
	})
	return nil
}

// openImage admits the bootstrap f and returns its size too.
func openImage(ctx context.Context, f *os.File) (*erofs.Image, int64, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if _, err := erofs.Check(ctx, f, st.Size(), erofs.Limits{}); err != nil {
		return nil, 0, err
	}
	m, err := erofs.Open(f, st.Size())
	if err != nil {
		return nil, 0, err
	}
	if m.RAFS() == nil {
		return nil, 0, errors.New("it is plain EROFS without RAFS tables, so its data cannot be verified")
	}
	return m, st.Size(), nil
}

// blobEntries returns m's blob table.
func blobEntries(m *erofs.Image) ([]chunk.Entry, error) {
	var out []chunk.Entry
	for i, raw := range m.BlobEntries() {
		e, err := chunk.ParseEntry(raw)
		if err != nil {
			return nil, fmt.Errorf("blob %d: %w", i, err)
		}
		out = append(out, e)
	}
	return out, nil
}

// imageBlobs returns m's blob table, and its chunk table sorted by blob.
func imageBlobs(m *erofs.Image) ([]chunk.Entry, map[uint32][]blobmgr.ChunkDigest, error) {
	entries, err := blobEntries(m)
	if err != nil {
		return nil, nil, err
	}
	digests := map[uint32][]blobmgr.ChunkDigest{}
	for c, err := range m.Chunks() {
		if err != nil {
			return nil, nil, err
		}
		digests[c.Blob] = append(digests[c.Blob], blobmgr.ChunkDigest{Index: int(c.Index), Off: c.Off, Len: c.Len, Digest: c.Digest})
	}
	return entries, digests, nil
}

// awaitDone removes w's mark when its blob is complete, as often as that
// happens: another image may ask for more of it later.
func (d *Daemon) awaitDone(img *image, v *device) {
	for {
		done := v.blob.Done()
		select {
		case <-img.closed:
			return
		case <-d.ctx.Done():
			return
		case <-done:
			d.kernel.completed(v)
		}
		if v.blob.Done() == done { // nothing was added meanwhile
			return
		}
	}
}

// release gives back what acquire returned. With the last mount the image is
// closed, as soon as the kernel has let go of its files.
func (d *Daemon) release(img *image) {
	d.mu.Lock()
	img.refs--
	last := img.refs == 0
	d.mu.Unlock()
	if last && !d.closeIfIdle(img) {
		d.background.Go(func() { d.linger(img) })
	}
}

// lingerEvery is how often a detached image is looked at.
const lingerEvery = time.Second

// linger waits until nobody uses img's files, or it is mounted again. The kernel lets
// go of some things a little after the unmount.
func (d *Daemon) linger(img *image) {
	for pause := time.Millisecond; ; pause = min(2*pause, lingerEvery) {
		select {
		case <-d.ctx.Done():
			return
		case <-time.After(pause):
		}
		if d.closeIfIdle(img) {
			return
		}
		if pause < lingerEvery && 2*pause >= lingerEvery {
			d.log.Info("image is unmounted here but still used elsewhere; it is served on", "image", img.key.id)
		}
	}
}

// closeIfIdle closes img and returns true if it has no mounts and the kernel
// does not need the daemon for it. It returns true as well if there is nothing
// left to do: img is closed already, or mounted again.
func (d *Daemon) closeIfIdle(img *image) bool {
	d.mu.Lock()
	if img.refs > 0 || d.images[img.key] != img {
		d.mu.Unlock()
		return true
	}
	if d.kernel.busy(img) {
		d.mu.Unlock()
		return false
	}
	delete(d.images, img.key)
	d.mu.Unlock()
	if err := d.closeImage(img); err != nil {
		d.log.Warn("close image", "image", img.key.id, "err", err)
	}
	d.used(img.key)
	select {
	case d.closed <- struct{}{}:
	default: // it is told already
	}
	return true
}

// closeImage closes what open opened.
func (d *Daemon) closeImage(img *image) error {
	close(img.closed)
	d.kernel.remove(img)
	d.o.Holder.drop(heldImage+img.key.String(), func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.images[img.key] != nil
	})
	errs := []error{img.boot.Close()}
	for _, v := range img.devices {
		errs = append(errs, d.drop(v))
	}
	d.mu.Lock()
	src := img.src
	d.mu.Unlock()
	if src != nil && !src.bound {
		src.origin.close()
	}
	return errors.Join(errs...)
}
