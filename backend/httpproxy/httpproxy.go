package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/erofsd/erofsd/backend"
)

// Options are the choices of a [Store].
type Options struct {
	// Addr is http://host, https://host, with a port if need be, or the absolute path of
	// a unix socket. Required. A path in it comes before Path.
	Addr string
	// Path is where the blobs are below Addr. "": at its root.
	Path string
	// HTTP is how connections are made.
	HTTP backend.HTTPOptions
	// Stall is how long a request may go without progress (less than 4 KiB, or
	// no answer) before it is given up. 0: 30 s.
	Stall time.Duration
}

// A Store is a [backend.Store] over one server. It keeps connections between calls and is
// safe for concurrent use.
type Store struct {
	base   *url.URL
	client *http.Client
	stall  time.Duration
}

// New returns a store. It makes no request.
func New(o Options) (*Store, error) {
	s := &Store{stall: o.Stall}
	if s.stall <= 0 {
		s.stall = 30 * time.Second
	}
	var err error
	if strings.HasPrefix(o.Addr, "/") {
		o.HTTP.Socket = o.Addr
		s.base = &url.URL{Scheme: "http", Host: "localhost", Path: "/"}
	} else if s.base, err = url.Parse(o.Addr); err != nil || s.base.Scheme != "http" && s.base.Scheme != "https" || s.base.Host == "" {
		// The text of err may hold a password.
		return nil, errors.New("address of the HTTP server is neither http://host, https://host nor the absolute path of a socket")
	}
	if s.base.User != nil || s.base.RawQuery != "" || s.base.Fragment != "" {
		return nil, errors.New("address of the HTTP server: a login, query or fragment has no place there")
	}
	s.base.Path = "/" + strings.TrimPrefix(s.base.Path, "/") // else JoinPath's result is relative
	s.base = s.base.JoinPath(o.Path)
	if s.client, err = backend.NewHTTPClient(o.HTTP); err != nil {
		return nil, err
	}
	return s, nil
}

// Close closes idle connections. The store stays usable.
func (s *Store) Close() error {
	s.client.CloseIdleConnections()
	return nil
}

// Ping asks the server whether it is there; any answer below 500 will do.
func (s *Store) Ping(ctx context.Context) error {
	return backend.Ping(s.client, s.base.String(), nil)(ctx)
}

// Open returns the blob of ref. With ref.Size it makes no request: a missing blob or one
// of another size shows at the first read. Without, it asks for the first byte to learn
// the size.
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
	b := &blob{store: s, ref: ref, url: s.base.JoinPath(ref.Digest.Encoded()), size: ref.Size}
	var err error
	if ref.Size == 0 {
		b.size, _, err = b.request(0, nil).Learn(ctx)
	}
	return b, err
}

type blob struct {
	store  *Store
	ref    backend.Ref
	url    *url.URL
	size   int64
	closed atomic.Bool
}

func (b *blob) Size() int64 { return b.size }

func (b *blob) Close() error {
	b.closed.Store(true)
	return nil
}

func (b *blob) ReadAt(ctx context.Context, p []byte, off int64) error {
	err := b.read(ctx, p, off)
	if err != nil {
		return fmt.Errorf("read %d bytes at %d of blob %s: %w", len(p), off, b.ref.Digest, err)
	}
	return nil
}

func (b *blob) read(ctx context.Context, p []byte, off int64) error {
	if b.closed.Load() {
		return os.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := backend.CheckRange(off, int64(len(p)), b.size); err != nil || len(p) == 0 {
		return err
	}
	_, _, err := b.request(off, p).Do(ctx)
	return err
}

func (b *blob) request(off int64, p []byte) backend.RangeRequest {
	return backend.RangeRequest{
		Ref: b.ref, Size: b.size, Off: off, P: p, Wait: b.store.stall,
		Send: func(ctx context.Context, header http.Header) (*http.Response, error) {
			return b.store.client.Do((&http.Request{Method: http.MethodGet, URL: b.url, Host: b.url.Host, Header: header}).WithContext(ctx))
		},
	}
}
