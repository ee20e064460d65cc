package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// disownBlob is blobmgr's Options.Disown.
func (d *Daemon) disownBlob(ctx context.Context, domain, id string, size int64) error {
	t, ok := d.kernel.(*cachefilesTransport)
	if !ok {
		return nil
	}
	return t.disown(ctx, imageKey{domain: domain}.object(id), size)
}

// disown removes for good what the kernel's cache has of a blob of which nothing else is
// known: nobody can say which digests it was checked against.
func (t *cachefilesTransport) disown(ctx context.Context, k cachefiles.Key, size int64) error {
	failpoint.Hit("daemon.cachefiles.disown")
	err := untilSettled(ctx, func() error {
		err := t.device.Cull(k)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, cachefiles.ErrInUse) && t.empty(k, size) {
			return nil
		}
		return err
	})
	if err == nil {
		err = syncNames(filepath.Join(t.device.Dir(), k.Path()), t.device.Dir())
	}
	if err != nil {
		return fmt.Errorf("what an unknown daemon left of blob %s in %s: %w", k.Cookie, t.device.Dir(), err)
	}
	failpoint.Hit("daemon.cachefiles.disowned")
	return nil
}

// syncNames makes durable that path, somewhere below root, is gone, also when directories
// above it are.
func syncNames(path, root string) error {
	for path != root {
		path = filepath.Dir(path)
		dir, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		return errors.Join(dir.Sync(), dir.Close())
	}
	return nil
}

// empty reports whether the kernel has the object of k open, and nothing is in it.
func (t *cachefilesTransport) empty(k cachefiles.Key, size int64) bool {
	t.mu.Lock()
	f := t.files[k]
	t.mu.Unlock()
	if f == nil {
		return false
	}
	empty := true
	err := f.Data(size, func(int64, int64) { empty = false })
	return err == nil && empty
}
