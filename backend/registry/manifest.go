package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry"

	"github.com/erofsd/erofsd/backend"
)

// Media types of docker, and the marks of nydus entries in an index
// (rafs-v6-format 3.7: the artifact type, before that an OS feature).
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	nydusArtifact  = "application/vnd.nydus.image.manifest.v1+json"
	nydusFeature   = "nydus.remoteimage.v1"
)

// maxManifest bounds a manifest or index, as the distribution specification does.
const maxManifest = 4 << 20

// fetchPart is how much of a blob Fetch asks for in one request.
const fetchPart = 8 << 20

// Manifest is an image manifest whose bytes match its digest.
type Manifest struct {
	Host, Repository string // as backend.Ref and Fetch take them
	Digest           digest.Digest
	MediaType        string
	Config           ocispec.Descriptor
	Layers           []ocispec.Descriptor // lowest first; digests well-formed, sizes not negative
	Annotations      map[string]string
}

// Manifest resolves a reference, host/repository:tag or host/repository@digest, to
// the manifest for Linux on this machine's architecture. Of an index it prefers
// an entry that nydus tools made. The error is fs.ErrNotExist, fs.ErrPermission
// or a *backend.StatusError where one of them applies.
func (s *Store) Manifest(ctx context.Context, reference string) (Manifest, error) {
	r, err := parse(reference)
	if err != nil {
		return Manifest{}, err
	}
	m, err := s.manifest(ctx, r)
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w; check the login for %s", err, r.Registry)
	}
	if err != nil {
		return Manifest{}, fmt.Errorf("get manifest of %s: %w", r, err)
	}
	return m, nil
}

// document is what manifests and indexes have in common; both are JSON objects.
type document struct {
	MediaType   string               `json:"mediaType"`
	Manifests   []ocispec.Descriptor `json:"manifests"`
	Config      ocispec.Descriptor   `json:"config"`
	Layers      []ocispec.Descriptor `json:"layers"`
	Annotations map[string]string    `json:"annotations"`
}

func (s *Store) manifest(ctx context.Context, r registry.Reference) (Manifest, error) {
	doc, d, err := s.document(ctx, r)
	if err == nil && doc.Manifests != nil {
		var entry ocispec.Descriptor
		if entry, err = choose(doc.Manifests); err != nil {
			return Manifest{}, err
		}
		r.Reference = entry.Digest.String()
		if doc, d, err = s.document(ctx, r); err == nil && doc.Manifests != nil {
			err = errors.New("its index leads to another index")
		}
	}
	if err != nil {
		return Manifest{}, err
	}
	for _, l := range append([]ocispec.Descriptor{doc.Config}, doc.Layers...) {
		if err := l.Digest.Validate(); err != nil || l.Size < 0 {
			return Manifest{}, fmt.Errorf("manifest %s names a blob with digest %q and size %d: %w", d, l.Digest, l.Size, fs.ErrInvalid)
		}
	}
	return Manifest{
		Host: r.Registry, Repository: r.Repository, Digest: d, MediaType: doc.MediaType,
		Config: doc.Config, Layers: doc.Layers, Annotations: doc.Annotations,
	}, nil
}

// choose picks the entry for this machine.
func choose(entries []ocispec.Descriptor) (ocispec.Descriptor, error) {
	const none, plain, nydus = 0, 1, 2
	rank := func(d ocispec.Descriptor) int {
		made := d.ArtifactType == nydusArtifact || d.Platform != nil && slices.Contains(d.Platform.OSFeatures, nydusFeature)
		fits := d.Platform != nil && d.Platform.OS == "linux" && d.Platform.Architecture == runtime.GOARCH
		switch {
		case made && (fits || d.Platform == nil):
			return nydus
		case fits:
			return plain
		}
		return none
	}
	best := ocispec.Descriptor{}
	if len(entries) > 0 {
		// The first of several that are equally good, as in other clients.
		best = slices.MaxFunc(entries, func(a, b ocispec.Descriptor) int { return cmp.Compare(rank(a), rank(b)) })
	}
	if rank(best) == none {
		var have []string
		for _, e := range entries[:min(len(entries), 20)] {
			if e.Platform != nil {
				have = append(have, e.Platform.OS+"/"+e.Platform.Architecture)
			}
		}
		return best, fmt.Errorf("no image for linux/%s in the index, which has [%s]: %w", runtime.GOARCH, strings.Join(have, " "), fs.ErrNotExist)
	}
	return best, best.Digest.Validate()
}

// document gets and verifies one manifest or index.
func (s *Store) document(ctx context.Context, r registry.Reference) (doc document, d digest.Digest, err error) {
	var body []byte
	var contentType string
	err = s.retry.Do(ctx, func(ctx context.Context) error {
		body, contentType, d, err = s.getManifest(ctx, r)
		return err
	})
	if err != nil {
		return doc, "", err
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return doc, "", fmt.Errorf("manifest %s: %w", d, err)
	}
	if doc.MediaType == "" {
		doc.MediaType = contentType
	}
	switch doc.MediaType {
	case ocispec.MediaTypeImageIndex, dockerIndex:
		// A document that can be read both ways means two images (CVE-2021-41190).
		if doc.Layers != nil || doc.Manifests == nil {
			err = fmt.Errorf("index %s is malformed: %w", d, fs.ErrInvalid)
		}
	case ocispec.MediaTypeImageManifest, dockerManifest:
		if doc.Manifests != nil {
			err = fmt.Errorf("manifest %s is malformed: %w", d, fs.ErrInvalid)
		}
	default:
		err = fmt.Errorf("manifest %s is of type %.100q, which is no image: %w", d, doc.MediaType, errors.ErrUnsupported)
	}
	return doc, d, err
}

// getManifest asks the sources of the registry once each, mirrors first, until one has the
// manifest.
func (s *Store) getManifest(ctx context.Context, r registry.Reference) ([]byte, string, digest.Digest, error) {
	way, err := s.route(r.Registry)
	if err != nil {
		return nil, "", "", err
	}
	mirrors := way.resolve
	if _, err := r.Digest(); err == nil {
		mirrors = way.mirrors
	}
	for _, m := range mirrors {
		body, contentType, d, err := s.getManifestAt(ctx, m, r)
		if err == nil || ctx.Err() != nil {
			return body, contentType, d, err
		}
		s.log.Debug("mirror does not give the manifest, asking elsewhere", "mirror", m.host, "err", err)
	}
	return s.getManifestAt(ctx, way.origin, r)
}

// getManifestAt makes one request. The body matches the digest: the one that was
// asked for, else the one that the registry states, else its own.
func (s *Store) getManifestAt(ctx context.Context, at *site, r registry.Reference) ([]byte, string, digest.Digest, error) {
	w := backend.NewWatch(s.login.with(ctx), s.stall)
	defer w.Stop()
	header := http.Header{"Accept": {strings.Join([]string{
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, dockerManifest, dockerIndex,
	}, ", ")}}
	resp, _, err := at.get(w.Context(), r.Repository, at.url(r.Repository, "manifests", r.ReferenceOrDefault()), header)
	if err != nil {
		return nil, "", "", w.Fail(translate(err))
	}
	defer resp.Body.Close()
	w.Answered()
	if resp.StatusCode != http.StatusOK {
		return nil, "", "", backend.NewStatusError(resp)
	}
	body, err := io.ReadAll(io.LimitReader(w.Reader(resp.Body), maxManifest+1))
	if err != nil {
		return nil, "", "", w.Fail(translate(err))
	}
	if len(body) > maxManifest {
		return nil, "", "", fmt.Errorf("it is larger than %d bytes", maxManifest)
	}
	want, err := r.Digest()
	if err != nil {
		want = digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	}
	if want == "" {
		want = digest.FromBytes(body)
	}
	if err := want.Validate(); err != nil {
		return nil, "", "", fmt.Errorf("digest %.100q of the manifest: %w", want, err)
	}
	if got := want.Algorithm().FromBytes(body); got != want {
		return nil, "", "", fmt.Errorf("the registry sent a manifest with digest %s for %s", got, want)
	}
	contentType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return body, contentType, want, nil
}

// Fetch returns the whole blob d, which must not be larger than limit bytes and
// must match its digest. It holds the blob in memory once.
func (s *Store) Fetch(ctx context.Context, host, repo string, d ocispec.Descriptor, limit int64) ([]byte, error) {
	p, err := s.fetch(ctx, backend.Ref{Host: host, Repository: repo, Digest: d.Digest, Size: d.Size}, limit)
	if err != nil {
		return nil, fmt.Errorf("fetch blob %s: %w", d.Digest, err)
	}
	return p, nil
}

func (s *Store) fetch(ctx context.Context, ref backend.Ref, limit int64) ([]byte, error) {
	b, err := backend.Retry(s, s.retry).Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	if b.Size() > limit {
		return nil, fmt.Errorf("it has %d bytes, more than the %d it may have", b.Size(), limit)
	}
	p := make([]byte, b.Size())
	for off := 0; off < len(p); off += fetchPart {
		if err := b.ReadAt(ctx, p[off:min(off+fetchPart, len(p))], int64(off)); err != nil {
			return nil, err
		}
	}
	if got := ref.Digest.Algorithm().FromBytes(p); got != ref.Digest {
		return nil, fmt.Errorf("the registry sent bytes with digest %s", got)
	}
	return p, nil
}
