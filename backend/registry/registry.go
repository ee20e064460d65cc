package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"oras.land/oras-go/v2/registry"

	"github.com/erofsd/erofsd/backend"
)

const userAgent = "erofsd"

// Options are the choices of a [Store]; the zero value reads public registries over TLS.
type Options struct {
	// Scheme is https or http. "": https; with HTTP.SkipVerify a registry that does not
	// speak TLS is read without, from the first time on that this shows.
	Scheme string
	// PlainHTTP is Scheme http.
	PlainHTTP bool
	// HTTP is how connections are made.
	HTTP backend.HTTPOptions
	// Credential gives the login for a registry (host or host:port), asked each
	// time the registry wants one that is not known or no longer good. Empty
	// credentials mean an anonymous read. Nil: always anonymous.
	Credential CredentialFunc
	// BlobURLScheme and BlobRedirectedHost replace scheme and host of the addresses
	// that a registry redirects to. "": left as they are.
	BlobURLScheme, BlobRedirectedHost string
	// Mirrors are asked before each registry, in this order.
	Mirrors []MirrorHost
	// HostsDir has a directory per registry with a hosts.toml of containerd, which
	// says where the registry and its mirrors are. "": none. Mirrors come first.
	HostsDir string
	// Stall is how long a request may go without progress (less than 4 KiB, or
	// no answer) before it is given up. 0: 30 s.
	Stall time.Duration
	// Retry is how Manifest, Fetch and Pusher try again. Open and ReadAt of blobs
	// do not; put backend.Retry around the store.
	Retry backend.RetryPolicy
	// Logger gets debug records, and what becomes of mirrors. Nil: none.
	Logger *slog.Logger
}

// A Store is a [backend.Store] over registries. It keeps connections and tokens
// between calls and is safe for concurrent use.
type Store struct {
	*core
	login *login
}

// core is what stores with different logins share.
type core struct {
	o      Options
	scheme string
	detect bool
	client *http.Client
	tokens *tokens
	stall  time.Duration
	retry  backend.RetryPolicy
	log    *slog.Logger

	// mu guards the fields below.
	mu      sync.Mutex
	routes  map[string]*route       // by registry
	clients map[string]*http.Client // of sites with other TLS options
}

// New returns a store. It makes no request.
func New(o Options) (*Store, error) {
	if o.Stall <= 0 {
		o.Stall = 30 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.HTTP.Logger == nil {
		o.HTTP.Logger = o.Logger
	}
	c := &core{
		o: o, scheme: o.Scheme, tokens: newTokens(), stall: o.Stall, retry: o.Retry, log: o.Logger,
		routes: make(map[string]*route), clients: make(map[string]*http.Client),
	}
	switch {
	case o.PlainHTTP:
		c.scheme = "http"
	case o.Scheme == "":
		c.scheme, c.detect = "https", o.HTTP.SkipVerify
	case o.Scheme != "http" && o.Scheme != "https":
		return nil, fmt.Errorf("scheme %q of the registry is neither https nor http", o.Scheme)
	}
	if s := o.BlobURLScheme; s != "" && s != "http" && s != "https" {
		return nil, fmt.Errorf("scheme %q of blob URLs is neither https nor http", s)
	}
	var err error
	if c.client, err = backend.NewHTTPClient(o.HTTP); err != nil {
		return nil, err
	}
	for _, m := range o.Mirrors {
		if _, err := c.nydusMirror(&site{}, m); err != nil {
			return nil, err
		}
	}
	return &Store{c, newLogin(o.Credential, c.tokens)}, nil
}

// As returns a store that reads with another login over the same connections.
func (s *Store) As(credential CredentialFunc) *Store {
	return &Store{s.core, newLogin(credential, s.tokens)}
}

// Close closes idle connections and ends pings. The store stays usable.
func (s *Store) Close() error {
	s.mu.Lock()
	routes, clients := slices.Collect(maps.Values(s.routes)), slices.Collect(maps.Values(s.clients))
	s.mu.Unlock()
	for _, r := range routes {
		if r.close != nil {
			r.close()
		}
	}
	for _, c := range append(clients, s.client) {
		c.CloseIdleConnections()
	}
	return nil
}

// Open returns the blob of ref. With ref.Size it makes no request: a missing or
// forbidden blob or one of another size shows at the first read. Without, it asks
// for the first byte to learn the size.
func (s *Store) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	b, err := s.open(s.login.with(ctx), ref)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", ref.Digest, err)
	}
	return &loginBlob{b, s.login, ref}, nil
}

func (s *Store) open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if _, err := repository(ref.Host, ref.Repository); err != nil {
		return nil, err
	}
	if err := ref.Digest.Validate(); err != nil {
		return nil, err
	}
	if ref.Size < 0 {
		return nil, fmt.Errorf("size %d is negative", ref.Size)
	}
	r, err := s.route(ref.Host)
	if err != nil {
		return nil, err
	}
	return r.blobs.Open(ctx, ref)
}

// loginBlob is a blob that is read as the login that opened it.
type loginBlob struct {
	backend.Blob
	login *login
	ref   backend.Ref
}

func (b *loginBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := b.Blob.ReadAt(b.login.with(ctx), p, off); err != nil {
		return fmt.Errorf("read %d bytes at %d of blob %s: %w", len(p), off, b.ref.Digest, err)
	}
	return nil
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
