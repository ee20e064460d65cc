package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/localfs"
	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/config"
)

// stores makes the chains of decorators and keeps the registry clients, with
// their connections, tokens and redirects, between mounts.
type stores struct {
	log *slog.Logger
	reg *prometheus.Registry

	// mu guards registries.
	mu         sync.Mutex
	registries map[registryKey]*registryStore
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

func newStores(log *slog.Logger, reg *prometheus.Registry) *stores {
	return &stores{log: log, reg: reg, registries: map[registryKey]*registryStore{}}
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
	limited := backend.Limit(backend.Retry(c, backend.RetryPolicy{}), backend.Limits{})
	rs := &registryStore{c, backend.Metrics(limited, s.reg, "registry")}
	s.registries[key] = rs
	return rs, nil
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
	return backend.Metrics(d, s.reg, "localfs")
}

// noStore is a store that has nothing, and says why.
type noStore struct{ why error }

func (s noStore) Open(context.Context, backend.Ref) (backend.Blob, error) { return nil, s.why }

// close drops idle connections.
func (s *stores) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, c := range s.registries {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// An origin is where an image's blobs come from, and how they are fetched.
type origin struct {
	store    backend.Store
	repo     backend.Ref // Host and Repository of the blobs
	prefetch blobmgr.Prefetch
	meter    *meter // of the store's reads, nil if nobody asks
	kind     string // of backend, for people
}

// close gives back what only this origin has. Its store can be used on.
func (o origin) close() {}

// image returns the origin that c says.
func (s *stores) image(c config.Image) (origin, error) {
	return origin{store: s.directory(c.Backend.LocalFS.Dir)}, nil
}
