package containerd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/convert"
)

// A blob is a part of an image.
type blob struct {
	ocispec.Descriptor
	body []byte
}

func newBlob(kind string, body []byte) blob {
	return blob{ocispec.Descriptor{MediaType: kind, Digest: digest.FromBytes(body), Size: int64(len(body))}, body}
}

// A layer is one of an ordinary image.
type layer struct {
	blob
	diffID digest.Digest
}

// layerOf packs the files of a directory.
func layerOf(t *testing.T, src string) layer {
	t.Helper()
	var plain, packed bytes.Buffer
	archive, zip := tar.NewWriter(&plain), gzip.NewWriter(&packed)
	err := errors.Join(archive.AddFS(os.DirFS(src)), archive.Close())
	if err == nil {
		_, err = zip.Write(plain.Bytes())
	}
	if err = errors.Join(err, zip.Close()); err != nil {
		t.Fatal(err)
	}
	return layer{newBlob(ocispec.MediaTypeImageLayerGzip, packed.Bytes()), digest.FromBytes(plain.Bytes())}
}

// layerWith is a layer of one file.
func layerWith(t *testing.T, name, text string) layer {
	t.Helper()
	src := t.TempDir()
	file := filepath.Join(src, name)
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = os.WriteFile(file, []byte(text), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return layerOf(t, src)
}

// An ordinary is an ordinary image.
type ordinary struct {
	layers           []layer
	config, manifest blob
}

// imageOf makes an ordinary image of layers, the lowest first.
func imageOf(t *testing.T, config ocispec.ImageConfig, layers ...layer) ordinary {
	t.Helper()
	all := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Config: config, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		all.RootFS.DiffIDs = append(all.RootFS.DiffIDs, l.diffID)
		m.Layers = append(m.Layers, l.Descriptor)
	}
	i := ordinary{layers: layers, config: newBlob(ocispec.MediaTypeImageConfig, marshal(t, all))}
	m.Config = i.config.Descriptor
	i.manifest = newBlob(ocispec.MediaTypeImageManifest, marshal(t, m))
	return i
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// blobs are all parts of the image but its manifest.
func (i ordinary) blobs() []blob {
	all := []blob{i.config}
	for _, l := range i.layers {
		all = append(all, l.blob)
	}
	return all
}

// push puts the image into the registry.
func (w *world) push(t *testing.T, i ordinary, reference string) {
	t.Helper()
	p := w.pusher(t, reference)
	pushes, ctx := errgroup.WithContext(t.Context())
	pushes.SetLimit(16) // each waits for the registry's disk
	for _, b := range i.blobs() {
		open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.body)), nil }
		pushes.Go(func() error { return p.Blob(ctx, b.Descriptor, open) })
	}
	if err := pushes.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := p.Manifest(t.Context(), i.manifest.Descriptor, i.manifest.body); err != nil {
		t.Fatal(err)
	}
}

// convert puts a directory, or the image of a layout, into the registry as a lazy image with a
// blob of data for each layer.
func (w *world) convert(t *testing.T, src, reference string) {
	t.Helper()
	if _, err := convert.Convert(t.Context(), src, w.pusher(t, reference), convert.Options{ChunkSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
}

// layout writes the image into a directory (image-layout.md of the OCI).
func (i ordinary) layout(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	blobs := filepath.Join(dir, "blobs", "sha256")
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{i.manifest.Descriptor}}
	files := map[string][]byte{
		filepath.Join(dir, ocispec.ImageLayoutFile): marshal(t, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}),
		filepath.Join(dir, ocispec.ImageIndexFile):  marshal(t, index),
	}
	for _, b := range append(i.blobs(), i.manifest) {
		files[filepath.Join(blobs, b.Digest.Encoded())] = b.body
	}
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, body := range files {
		if err := os.WriteFile(name, body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// pusher returns what puts an image into the registry.
func (w *world) pusher(t *testing.T, reference string) *registry.Pusher {
	t.Helper()
	store, err := registry.New(registry.Options{PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	p, err := store.Pusher(reference)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
