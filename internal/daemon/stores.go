package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/localfs"
	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/config"
)

// stores makes the chains of decorators and keeps clients, with their connections, tokens
// and redirects, for all that want the same.
type stores struct {
	log    *slog.Logger
	reg    *prometheus.Registry
	adjust func(*config.Image) // nil: nothing

	// mu guards what follows.
	mu         sync.Mutex
	registries map[registryKey]*registryStore // of references
	shared     map[[32]byte]*sharedStore      // of configurations, by what storeKey says
}

type registryKey struct {
	plainHTTP bool
	caFile    string
}

// registryStore is a registry client: bare for manifests, and with the
// decorators for blobs, which share their limits.
type registryStore struct {
	*registry.Store
	blobs backend.Store
}

// A sharedStore is what all images with the same backend and login read from.
type sharedStore struct {
	store  backend.Store
	closer io.Closer // drops idle connections; the store stays usable
	users  int       // guarded by stores.mu
}

func newStores(o Options, reg *prometheus.Registry) *stores {
	return &stores{
		log: o.Logger, reg: reg, adjust: o.Nydusd.Adjust,
		registries: map[registryKey]*registryStore{}, shared: map[[32]byte]*sharedStore{},
	}
}

// registry returns the client that r asks for.
func (s *stores) registry(r api.MountRequest) (*registryStore, error) {
	key := registryKey{r.PlainHTTP, r.CAFile}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.registries[key]; c != nil {
		return c, nil
	}
	c, err := registry.New(registry.Options{
		PlainHTTP: r.PlainHTTP, HTTP: backend.HTTPOptions{CAFiles: []string{r.CAFile}}, Logger: s.log, Credential: registry.DockerCredentials(),
	})
	if err != nil {
		return nil, fmt.Errorf("prepare registry client: %w", err)
	}
	rs := &registryStore{c, s.decorate(c, backend.RetryPolicy{}, config.TypeRegistry)}
	s.registries[key] = rs
	return rs, nil
}

// decorate gives a store over the network what reads of it need.
func (s *stores) decorate(c backend.Store, p backend.RetryPolicy, kind string) backend.Store {
	return backend.Metrics(backend.Limit(backend.Retry(c, p), backend.Limits{}), s.reg, kind)
}

// directory returns the store over a directory of blobs. One that is missing
// is no error as long as nothing is asked of it: a complete cache needs none.
func (s *stores) directory(dir string) backend.Store {
	if dir == "" {
		return noStore{fmt.Errorf("the image was mounted without --blob-dir, and the cache does not have all of it: %w", fs.ErrNotExist)}
	}
	d, err := localfs.New(dir)
	if err != nil {
		return noStore{err}
	}
	return backend.Metrics(d, s.reg, config.TypeLocalFS)
}

// noStore is a store that has nothing, and says why.
type noStore struct{ why error }

func (s noStore) Open(context.Context, backend.Ref) (backend.Blob, error) { return nil, s.why }

// An origin is where an image's blobs come from, and how they are fetched.
type origin struct {
	store    backend.Store
	repo     backend.Ref // Host and Repository of the blobs
	prefetch blobmgr.Prefetch
	meter    *meter // of the store's reads, nil if nobody asks
	kind     string // of backend, for people
	mirrored bool   // store may ask mirrors
	done     func() // gives the store back; nil: nothing to do
}

// close gives back what is shared. The store can be used on by who still has it.
func (o origin) close() {
	if o.done != nil {
		o.done()
	}
}

// image returns the origin that c says. It makes no request.
func (s *stores) image(c config.Image) (origin, error) {
	if s.adjust != nil {
		s.adjust(&c)
	}
	key, err := storeKey(c.Backend)
	if err != nil {
		return origin{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	shared := s.shared[key]
	if shared == nil {
		shared = &sharedStore{}
		if shared.store, shared.closer, err = s.build(c.Backend); err != nil {
			return origin{}, fmt.Errorf("prepare backend: %w", err)
		}
		s.shared[key] = shared
	}
	shared.users++
	o := origin{
		meter: &meter{Store: shared.store}, kind: c.Backend.Type, prefetch: prefetchOf(c),
		done: sync.OnceFunc(func() { s.leave(key, shared) }),
	}
	o.store = o.meter
	o.mirrored = mirrored(c.Backend)
	if r := c.Backend.Registry; r != nil {
		o.repo = backend.Ref{Host: r.Host, Repository: r.Repo}
	}
	return o, nil
}

// storeKey is the same for backends that are the same, login included; repositories of a
// registry are read by the same client. It is for memory only.
func storeKey(b config.Backend) ([32]byte, error) {
	if b.Registry != nil {
		r := *b.Registry
		r.Repo = ""
		b.Registry = &r
	}
	text, err := config.BlobEntry{Image: config.Image{Backend: b}}.MarshalState()
	if err != nil {
		return [32]byte{}, err
	}
	return sha256.Sum256(text), nil
}

// leave gives a shared store back.
func (s *stores) leave(key [32]byte, shared *sharedStore) {
	s.mu.Lock()
	shared.users--
	last := shared.users == 0
	if last {
		delete(s.shared, key)
	}
	s.mu.Unlock()
	if !last || shared.closer == nil {
		return
	}
	if err := shared.closer.Close(); err != nil {
		s.log.Debug("close idle connections", "err", err)
	}
}

// minBurst is how many bytes of prefetch may come at once whatever the limit: a request.
const minBurst = 1 << 20

// prefetchOf is what c wants fetched unasked.
func prefetchOf(c config.Image) blobmgr.Prefetch {
	p := blobmgr.Prefetch{Workers: c.Prefetch.Threads}
	if on := c.Prefetch.Enable; on != nil && *on {
		p.Mode = blobmgr.All
	} else if on != nil {
		p.Mode = blobmgr.Nothing
	}
	if n := int64(c.Prefetch.BandwidthLimit); n > 0 {
		p.Pace = rate.NewLimiter(rate.Limit(n), int(max(n/10, minBurst)))
	}
	if a := c.Amplify; a != nil && *a > 0 {
		p.Window = int64(*a)
	}
	return p
}

// close drops idle connections.
func (s *stores) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, c := range s.registries {
		errs = append(errs, c.Close())
	}
	for _, c := range s.shared {
		if c.closer != nil {
			errs = append(errs, c.closer.Close())
		}
	}
	return errors.Join(errs...)
}
