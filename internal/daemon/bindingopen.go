package daemon

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/erofsd/erofsd/internal/chunk"
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
		opening := *src
		opening.bound = true
		opening.tables = d.sideTables(b)
		img, err := d.acquire(attempt, &opening)
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

// maxSideTable bounds a chunk table beside a bootstrap, in bytes.
const maxSideTable = 64 << 20

// sideTables returns the chunk tables of b that lie beside its bootstrap or in the
// configured directory, where nydus-snapshotter puts them: each spares a request. Those that
// are not right are as good as missing.
func (d *Daemon) sideTables(b *binding) map[string][]byte {
	d.mu.Lock()
	dirs := []string{filepath.Dir(b.src.label), b.config.WorkDir}
	d.mu.Unlock()
	tables := map[string][]byte{}
	for _, e := range b.blobs {
		if d.blobs.Known(b.key.domain, e.ID) {
			continue
		}
		for _, dir := range dirs {
			if dir == "" {
				continue
			}
			p, err := readBounded(filepath.Join(dir, e.ID+".blob.meta"), maxSideTable)
			if err != nil {
				continue
			}
			if _, err := chunk.ParseTable(p, e); err == nil {
				tables[e.ID] = p
				break
			}
		}
	}
	return tables
}

// readBounded reads a regular file of at most limit bytes.
func readBounded(name string, limit int64) ([]byte, error) {
	f, err := openRegular(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(p)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return p, err
}
