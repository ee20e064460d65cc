package object

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/erofsd/erofsd/backend"
)

// A Store is a [backend.Store] over objects. Its fields are not changed after first use.
type Store struct {
	// Get sends one GET for the object key. header holds Range and, where it is known
	// which version of the object is wanted, If-Match. What is not an answer of 2xx is
	// an error, a *backend.StatusError where the server answered at all.
	Get func(ctx context.Context, key string, header http.Header) (*http.Response, error)
	// Prefix and the hex digits of a blob's digest are the key of its object.
	Prefix string
	// Stall is how long a request may go without progress (less than 4 KiB, or no
	// answer) before it is given up. 0: 30 s.
	Stall time.Duration
	// Untagged says that an ETag names no version: several servers at one address may each
	// have their own for the same bytes.
	Untagged bool
}

// Open returns the blob of ref. With ref.Size it makes no request: a missing or
// forbidden blob or one of another size shows at the first read. Without, it asks
// for the first byte to learn the size.
func (s *Store) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	b, err := s.open(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", ref.Digest, err)
	}
	return b, nil
}

func (s *Store) open(ctx context.Context, ref backend.Ref) (*blob, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := ref.Digest.Validate(); err != nil {
		return nil, err
	}
	if ref.Size < 0 {
		return nil, fmt.Errorf("size %d is negative", ref.Size)
	}
	b := &blob{store: s, ref: ref, key: s.Prefix + ref.Digest.Encoded(), size: ref.Size}
	if ref.Size == 0 {
		var err error
		b.size, _, err = b.request(0, nil).Learn(ctx)
		return b, err
	}
	return b, nil
}

func (s *Store) stall() time.Duration {
	if s.Stall <= 0 {
		return 30 * time.Second
	}
	return s.Stall
}

type blob struct {
	store  *Store
	ref    backend.Ref
	key    string
	size   int64 // -1: not known yet, in Open only
	closed atomic.Bool

	// mu guards etag.
	mu   sync.Mutex
	etag string // names the version of the object that is being read; "": not known
}

func (b *blob) Size() int64 { return b.size }

func (b *blob) Close() error {
	b.closed.Store(true)
	return nil
}

func (b *blob) ReadAt(ctx context.Context, p []byte, off int64) error {
	err := b.check(ctx, p, off)
	if err == nil && len(p) > 0 {
		_, _, err = b.request(off, p).Do(ctx)
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

// request is a request for a range.
func (b *blob) request(off int64, p []byte) backend.RangeRequest {
	return backend.RangeRequest{Ref: b.ref, Size: b.size, Off: off, P: p, Wait: b.store.stall(), Send: b.send}
}

// send asks for the version of the object that was read before, if any was, and
// accepts no other.
func (b *blob) send(ctx context.Context, header http.Header) (*http.Response, error) {
	want := b.version("")
	if want != "" {
		header.Set("If-Match", want)
	}
	resp, err := b.store.Get(ctx, b.key, header)
	if status, ok := errors.AsType[*backend.StatusError](err); ok && status.Code == http.StatusPreconditionFailed && want != "" {
		return nil, fmt.Errorf("the object was replaced since its first read: %w", status)
	}
	if err != nil {
		return nil, err
	}
	if b.store.Untagged {
		return resp, nil
	}
	// A weak tag names no bytes.
	if tag := resp.Header.Get("Etag"); tag != "" && !strings.HasPrefix(tag, "W/") && b.version(tag) != tag {
		resp.Body.Close()
		return nil, errors.New("the object was replaced since its first read: its ETag is another now")
	}
	return resp, nil
}

// version returns the tag of the version that is being read; tag becomes it when there
// is none yet.
func (b *blob) version(tag string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.etag == "" {
		b.etag = tag
	}
	return b.etag
}
