package daemon

import (
	"context"
	"fmt"
	"os"
	"time"
)

// openAgain is how long an image that could not be opened is left alone.
const openAgain = time.Second

// openBinding opens the image of b, once for all who want it.
func (d *Daemon) openBinding(ctx context.Context, b *binding) error {
	if b.opened.Load() {
		return nil
	}
	if err := b.opening.take(ctx); err != nil {
		return err
	}
	defer b.opening.give()
	if b.opened.Load() {
		return nil
	}
	for {
		d.mu.Lock()
		src, err := b.src, b.err
		if err != nil && time.Since(b.failed) < openAgain {
			d.mu.Unlock()
			return fmt.Errorf("not tried again so soon: %w", err)
		}
		attempt, stop := context.WithCancel(ctx)
		b.stop = stop
		d.mu.Unlock()
		unlink := context.AfterFunc(b.ctx, stop)
		img, err := d.acquire(attempt, src)
		if err == nil {
			err = d.checkBound(b, img)
		}
		unlink()
		stop()
		if again, err := d.finishOpen(ctx, b, src, img, err); !again {
			return err
		}
	}
}

// checkBound refuses an image whose blobs are not what their names say: who mounts it
// names them by these. It releases img then.
func (d *Daemon) checkBound(b *binding, img *image) error {
	for i, e := range b.blobs {
		if img.devices[i].blob.ID() != e.ID {
			d.release(img)
			return fmt.Errorf("blob %s of image %s differs from what another image of its domain says of it; one of them is damaged or forged", e.ID, b.key.id)
		}
	}
	return nil
}

// finishOpen records the outcome of an attempt to open b with src. again says that src is
// not b's source any more.
func (d *Daemon) finishOpen(ctx context.Context, b *binding, src *source, img *image, err error) (again bool, _ error) {
	d.mu.Lock()
	b.stop = nil
	stale, gone := b.src != src, b.ctx.Err() != nil
	if err == nil && !gone {
		b.img, b.err = img, nil
		b.opened.Store(true)
	}
	if err != nil && !stale && ctx.Err() == nil {
		b.err, b.failed = err, time.Now()
	}
	src = b.src
	d.mu.Unlock()
	switch {
	case err == nil && gone:
		d.release(img)
		return false, os.ErrClosed
	case err == nil && stale:
		return false, d.addSource(ctx, img, src)
	case err != nil && stale && !gone && ctx.Err() == nil:
		return true, nil
	}
	return false, err
}
