package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/erofsd/erofsd/backend"
)

const userAgent = "erofsd"

// Options are the choices of a [Store]; the zero value reads public registries over TLS.
type Options struct {
	// PlainHTTP speaks http instead of https to the registries.
	PlainHTTP bool
	// HTTP is how connections are made.
	HTTP backend.HTTPOptions
	// Credential gives the login for a registry (host or host:port), asked each
	// time the registry wants one that is not known or no longer good. Empty
	// credentials mean an anonymous read. Nil: always anonymous.
	Credential func(ctx context.Context, host string) (auth.Credential, error)
	// Stall is how long a request may go without progress (less than 4 KiB, or
	// no answer) before it is given up. 0: 30 s.
	Stall time.Duration
	// Retry is how Manifest, Fetch and Pusher try again. Open and ReadAt of blobs
	// do not; put backend.Retry around the store.
	Retry backend.RetryPolicy
	// Logger gets debug records. Nil: none.
	Logger *slog.Logger
}

// A Store is a [backend.Store] over registries. It keeps connections and tokens
// between calls and is safe for concurrent use.
type Store struct {
	scheme string
	plain  *http.Client // without credentials, for storage hosts
	auth   *auth.Client // for registries, on the same connections
	stall  time.Duration
	retry  backend.RetryPolicy
	log    *slog.Logger
}

// New returns a store. It makes no request.
func New(o Options) (*Store, error) {
	plain, err := backend.NewHTTPClient(o.HTTP)
	if err != nil {
		return nil, err
	}
	s := &Store{scheme: "https", plain: plain, stall: o.Stall, retry: o.Retry, log: o.Logger}
	if o.PlainHTTP {
		s.scheme = "http"
	}
	if s.stall <= 0 {
		s.stall = 30 * time.Second
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.auth = &auth.Client{
		Client:     s.plain,
		Header:     http.Header{"User-Agent": {userAgent}},
		Credential: o.Credential,
		Cache:      auth.NewCache(),
	}
	return s, nil
}

// Close closes idle connections. The store stays usable.
func (s *Store) Close() error {
	s.plain.CloseIdleConnections()
	return nil
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
	repo, err := repository(ref.Host, ref.Repository)
	if err != nil {
		return nil, err
	}
	if err := ref.Digest.Validate(); err != nil {
		return nil, err
	}
	if ref.Size < 0 {
		return nil, fmt.Errorf("size %d is negative", ref.Size)
	}
	b := &blob{store: s, repo: repo, ref: ref, home: s.url(repo, "blobs", ref.Digest.String()), size: ref.Size}
	if ref.Size == 0 {
		b.size, err = b.learnSize(ctx)
	}
	return b, err
}

// learnSize reads the first byte of a blob. Only that of an empty blob cannot be
// satisfied (RFC 9110, 14.1.2).
func (b *blob) learnSize(ctx context.Context) (int64, error) {
	b.size = -1
	size, err := b.get(ctx, b.home, make([]byte, 1), 0)
	if status, ok := errors.AsType[*backend.StatusError](err); ok && status.Code == http.StatusRequestedRangeNotSatisfiable {
		return 0, nil
	}
	if size == 0 {
		return 0, nil
	}
	if err == nil && size < 0 {
		err = errors.New("the server does not say how large it is: give the size in the reference")
	}
	return size, err
}

// repository checks the names, which come from users and manifests, before they
// become part of a URL.
func repository(host, name string) (registry.Reference, error) {
	r := registry.Reference{Registry: host, Repository: name}
	if err := errors.Join(r.ValidateRegistry(), r.ValidateRepository()); err != nil {
		return r, fmt.Errorf("repository %q of registry %q: %w", name, host, err)
	}
	return r, nil
}

// parse reads an image reference. A login in it is not repeated in the error.
func parse(reference string) (registry.Reference, error) {
	host, _, _ := strings.Cut(reference, "/")
	switch {
	case strings.Contains(reference, "://"):
		return registry.Reference{}, errors.New("image reference is a URL: write host/repository:tag")
	case strings.Contains(host, "@"):
		return registry.Reference{}, errors.New("image reference holds a login: write host/repository:tag and use docker login")
	}
	r, err := registry.ParseReference(reference)
	if err != nil {
		return r, fmt.Errorf("image reference %q: %w; write host/repository:tag", reference, err)
	}
	return r, nil
}

// url is an address of the distribution API.
func (s *Store) url(r registry.Reference, kind, name string) *url.URL {
	return &url.URL{Scheme: s.scheme, Host: r.Host(), Path: "/v2/" + r.Repository + "/" + kind + "/" + name}
}

// do sends a request for something of repository r. The credential goes along
// only when u is the registry itself; redirects are followed.
func (s *Store) do(ctx context.Context, r registry.Reference, u *url.URL, header http.Header) (*http.Response, error) {
	req := (&http.Request{Method: http.MethodGet, URL: u, Host: u.Host, Header: header}).WithContext(ctx)
	req.Header.Set("Accept-Encoding", "identity")
	if u.Scheme == s.scheme && u.Host == r.Host() {
		return s.auth.Do(req.WithContext(auth.AppendRepositoryScope(ctx, r, auth.ActionPull)))
	}
	req.Header.Set("User-Agent", userAgent)
	return s.plain.Do(req)
}
