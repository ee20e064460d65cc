package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"oras.land/oras-go/v2/registry"

	"github.com/erofsd/erofsd/backend"
)

// maxSkip is how many bytes are read and thrown away when a server sends the
// whole blob for a range: less than what a round trip is worth.
const maxSkip = 256 << 10

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
	w := newWatch(ctx, b.store.stall)
	defer w.stop()
	header := http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1)}}
	resp, err := b.store.do(w.ctx, b.repo, u, header)
	if err != nil {
		return -1, w.fail(err)
	}
	defer resp.Body.Close()
	w.progress(minProgress)
	size, skip, err := b.accept(resp, p, off)
	if err != nil {
		// A short body that is read to its end leaves the connection usable.
		io.CopyN(io.Discard, resp.Body, minProgress)
		return size, err
	}
	err = w.fail(receive(w.reader(resp.Body), p, skip, resp.StatusCode == http.StatusPartialContent))
	if at := resp.Request.URL; err == nil && at.String() != u.String() {
		b.remember(at)
	}
	return size, err
}

// accept checks that resp is the answer to a request for p at off of this blob.
// skip is how many bytes of its body come before.
func (b *blob) accept(resp *http.Response, p []byte, off int64) (size, skip int64, err error) {
	n := int64(len(p))
	switch resp.StatusCode {
	case http.StatusPartialContent:
		first, last, total, err := parseContentRange(resp.Header.Get("Content-Range"))
		if err != nil {
			return -1, 0, err
		}
		if size = total; first != off || last != off+n-1 {
			err = fmt.Errorf("asked for bytes %d to %d, the server sent %d to %d", off, off+n-1, first, last)
			return size, 0, errors.Join(b.checkSize(size), err)
		}
		if length := resp.ContentLength; length >= 0 && length != n {
			return size, 0, fmt.Errorf("asked for %d bytes, the server announces %d: %w", n, length, io.ErrUnexpectedEOF)
		}
	case http.StatusOK:
		size, skip = resp.ContentLength, off
		if skip > maxSkip {
			return size, 0, errors.New("the server sent the whole blob for a range: it or a proxy before it does not support ranges, which lazy images need")
		}
	case http.StatusRequestedRangeNotSatisfiable:
		if total, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes */"); ok {
			if size, err = strconv.ParseInt(total, 10, 64); err == nil && b.size >= 0 && size != b.size {
				return size, 0, b.checkSize(size)
			}
		}
		return -1, 0, backend.NewStatusError(resp)
	default:
		return -1, 0, backend.NewStatusError(resp)
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return size, 0, errors.New("the server encodes ranges though it was asked not to: blobs must be served as stored")
	}
	return size, skip, b.checkSize(size)
}

// checkSize compares the size that the server gives, -1 when it does not, with
// ours, -1 before it is known.
func (b *blob) checkSize(size int64) error {
	if size < 0 || b.size < 0 || size == b.size {
		return nil
	}
	return backend.CheckSize(backend.Ref{Digest: b.ref.Digest, Size: b.size}, size)
}

// receive fills p from a body. exact says that the body must end then.
func receive(body io.Reader, p []byte, skip int64, exact bool) error {
	if skip > 0 {
		if _, err := io.CopyN(io.Discard, body, skip); err != nil {
			return short(err)
		}
	}
	if n, err := io.ReadFull(body, p); err != nil {
		return fmt.Errorf("body ended after %d of %d bytes: %w", n, len(p), short(err))
	}
	if !exact {
		return nil
	}
	// This also lets the connection go back to the pool.
	switch n, err := body.Read(make([]byte, 1)); {
	case n > 0:
		return fmt.Errorf("the server sent more than the %d bytes it was asked for", len(p))
	case err != nil && err != io.EOF:
		return err
	}
	return nil
}

// short names the end of a body that came too early.
func short(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseContentRange parses "bytes first-last/size" (RFC 9110, 14.4). A size of
// "*" gives -1.
func parseContentRange(v string) (first, last, size int64, err error) {
	bad := fmt.Errorf("the server answered a range with content range %.100q", v)
	rest, ok := strings.CutPrefix(v, "bytes ")
	span, total, ok2 := strings.Cut(rest, "/")
	from, to, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, -1, bad
	}
	first, err1 := strconv.ParseInt(from, 10, 64)
	last, err2 := strconv.ParseInt(to, 10, 64)
	size = -1
	var err3 error
	if total != "*" {
		size, err3 = strconv.ParseInt(total, 10, 64)
	}
	if err1 != nil || err2 != nil || err3 != nil || first < 0 || last < first || total != "*" && size <= last {
		return 0, 0, -1, bad
	}
	return first, last, size, nil
}
