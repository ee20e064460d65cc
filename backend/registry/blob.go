package registry

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/erofsd/erofsd/backend"
)

// blob is a blob at one site.
type blob struct {
	site   *site
	ref    backend.Ref
	size   int64 // -1: not known yet, in open only
	closed atomic.Bool

	// mu guards storage.
	mu      sync.Mutex
	storage *storage // where the site sent us last, probably signed; nil: ask the site
}

func (b *blob) Size() int64 { return b.size }

func (b *blob) Close() error {
	b.closed.Store(true)
	return nil
}

func (b *blob) ReadAt(ctx context.Context, p []byte, off int64) error {
	if b.closed.Load() {
		return os.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := backend.CheckRange(off, int64(len(p)), b.size); err != nil || len(p) == 0 {
		return err
	}
	return b.read(ctx, p, off)
}

// read asks the storage host that the site named last, and the site when there is none
// or it refuses: the address has expired or the blob was moved.
func (b *blob) read(ctx context.Context, p []byte, off int64) error {
	if at := b.stored(); at != nil {
		err := b.get(ctx, at.url, p, off)
		if err == nil || ctx.Err() != nil {
			return err
		}
		b.forget(at)
		status, ok := errors.AsType[*backend.StatusError](err)
		if !ok || !stale(status.Code) {
			return err
		}
		b.site.log.Debug("storage address is no longer good, asking the registry again", "blob", b.ref.Digest, "err", err)
	}
	return b.get(ctx, b.home(), p, off)
}

// home is where the site has the blob.
func (b *blob) home() *url.URL {
	return b.site.url(b.ref.Repository, "blobs", b.ref.Digest.String())
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

// stored returns the storage address, unless it is known to have expired.
func (b *blob) stored() *storage {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.storage != nil && !b.storage.until.IsZero() && time.Now().After(b.storage.until) {
		b.storage = nil
	}
	return b.storage
}

func (b *blob) remember(at *storage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.storage = at
}

// forget drops a storage address unless it was replaced meanwhile.
func (b *blob) forget(old *storage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.storage == old {
		b.storage = nil
	}
}

// get fills p from offset off of the blob at u, in one request.
func (b *blob) get(ctx context.Context, u *url.URL, p []byte, off int64) error {
	q, at := b.request(u, p, off)
	_, _, err := q.Do(ctx)
	if err == nil && *at != nil {
		b.remember(*at)
	}
	return err
}

// learnSize asks the site how large the blob is.
func (b *blob) learnSize(ctx context.Context) (int64, error) {
	q, _ := b.request(b.home(), nil, 0)
	size, _, err := q.Learn(ctx)
	return size, err
}

// request is one for the bytes at u. at will be where it was redirected to.
func (b *blob) request(u *url.URL, p []byte, off int64) (q backend.RangeRequest, at **storage) {
	at = new(*storage)
	return backend.RangeRequest{
		Ref: b.ref, Size: b.size, Off: off, P: p, Wait: b.site.stall,
		Send: func(ctx context.Context, header http.Header) (resp *http.Response, err error) {
			resp, *at, err = b.site.get(ctx, b.ref.Repository, u, header)
			return resp, translate(err)
		},
	}, at
}
