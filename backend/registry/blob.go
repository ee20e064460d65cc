package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"

	"oras.land/oras-go/v2/registry"

	"github.com/erofsd/erofsd/backend"
)

type blob struct {
	store  *Store
	repo   registry.Reference
	ref    backend.Ref
	home   *url.URL // where the registry has it
	size   int64    // -1: not known yet, in Open only
	closed atomic.Bool

	// mu guards storage.
	mu      sync.Mutex
	storage *url.URL // where the registry sent us last, probably signed; nil: ask the registry
}

func (b *blob) Size() int64 { return b.size }

func (b *blob) Close() error {
	b.closed.Store(true)
	return nil
}

func (b *blob) ReadAt(ctx context.Context, p []byte, off int64) error {
	err := b.check(ctx, p, off)
	if err == nil && len(p) > 0 {
		err = b.read(ctx, p, off)
	}
	if err != nil {
		return fmt.Errorf("read %d bytes at %d of blob %s: %w", len(p), off, b.ref.Digest, err)
	}
	return nil
}

func (b *blob) check(ctx context.Context, p []byte, off int64) error {
	if b.closed.Load() {
		return os.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return backend.CheckRange(off, int64(len(p)), b.size)
}

// read asks the storage host that the registry named last, and the registry when
// there is none or it refuses: the address has expired or the blob was moved.
func (b *blob) read(ctx context.Context, p []byte, off int64) error {
	if storage := b.stored(); storage != nil {
		_, err := b.get(ctx, storage, p, off)
		if err == nil || ctx.Err() != nil {
			return err
		}
		b.forget(storage)
		status, ok := errors.AsType[*backend.StatusError](err)
		if !ok || !stale(status.Code) {
			return err
		}
		b.store.log.Debug("storage address is no longer good, asking the registry again", "blob", b.ref.Digest, "err", err)
	}
	_, err := b.get(ctx, b.home, p, off)
	return err
}

// stale reports whether a storage host answers so to an address that expired:
// 403 mostly, 400 from Google, 404 and 410 when the blob moved.
func stale(code int) bool {
	switch code {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusGone:
		return true
	}
	return false
}

func (b *blob) stored() *url.URL {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.storage
}

func (b *blob) remember(storage *url.URL) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.storage = storage
}

// forget drops a storage address unless it was replaced meanwhile.
func (b *blob) forget(old *url.URL) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.storage == old {
		b.storage = nil
	}
}

// get fills p from offset off of the blob at u, in one request. size is the
// blob's size as the server gives it, even with an error; -1 when it did not.
func (b *blob) get(ctx context.Context, u *url.URL, p []byte, off int64) (size int64, err error) {
	q := backend.RangeRequest{
		Ref: b.ref, Size: b.size, Off: off, P: p, Wait: b.store.stall,
		Send: func(ctx context.Context, header http.Header) (*http.Response, error) {
			resp, err := b.store.do(ctx, b.repo, u, header)
			return resp, translate(err)
		},
	}
	size, from, err := q.Do(ctx)
	if err == nil && from.String() != u.String() {
		b.remember(from)
	}
	return size, err
}
