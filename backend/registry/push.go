package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/erofsd/erofsd/backend"
)

// pushStall is how long a push may go without progress: at the end of a large
// blob a registry reads all of it again before it answers.
const pushStall = 5 * time.Minute

// A Pusher uploads an image to one repository. It is safe for concurrent use.
type Pusher struct {
	store *Store
	ref   registry.Reference
	repo  *remote.Repository
}

// Pusher returns the pusher for reference, host/repository:tag; without a tag it
// is latest. It makes no request.
func (s *Store) Pusher(reference string) (*Pusher, error) {
	r, err := parse(reference)
	if err != nil {
		return nil, err
	}
	route, err := s.route(r.Registry)
	if err != nil {
		return nil, err
	}
	repo := &remote.Repository{Client: uploads{s, route.origin}, Reference: r, PlainHTTP: route.origin.base().Scheme == "http"}
	return &Pusher{store: s, ref: r, repo: repo}, nil
}

// uploads sends what oras asks for to the registry, as the store's login.
type uploads struct {
	store *Store
	site  *site
}

// Do is what oras calls.
func (u uploads) Do(req *http.Request) (*http.Response, error) {
	return u.site.do(req.WithContext(u.store.login.with(req.Context())))
}

// Blob uploads the blob desc unless the repository has it. open returns its bytes
// from the start, once for every attempt.
func (p *Pusher) Blob(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	err := p.attempt(ctx, func(w *backend.Watch) error {
		if there, err := p.repo.Blobs().Exists(w.Context(), desc); there || err != nil {
			return err
		}
		body, err := open()
		if err != nil {
			return fmt.Errorf("open source: %w", err)
		}
		defer body.Close()
		return p.repo.Blobs().Push(w.Context(), desc, w.Reader(body))
	})
	if err != nil {
		return fmt.Errorf("push blob %s to %s: %w", desc.Digest, p.ref, err)
	}
	return nil
}

// Manifest uploads a manifest, of which desc gives media type, digest and size,
// and tags it. The blobs it names must be there.
func (p *Pusher) Manifest(ctx context.Context, desc ocispec.Descriptor, body []byte) error {
	err := p.attempt(ctx, func(w *backend.Watch) error {
		return p.repo.Manifests().PushReference(w.Context(), desc, bytes.NewReader(body), p.ref.ReferenceOrDefault())
	})
	if err != nil {
		return fmt.Errorf("push manifest to %s: %w", p.ref, err)
	}
	return nil
}

func (p *Pusher) attempt(ctx context.Context, f func(w *backend.Watch) error) error {
	return p.store.retry.Do(ctx, func(ctx context.Context) error {
		w := backend.NewWatch(ctx, max(p.store.stall, pushStall))
		defer w.Stop()
		return w.Fail(translate(f(w)))
	})
}
