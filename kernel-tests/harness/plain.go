package harness

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/kernel-tests/regserver"
)

// PublishPlain has the registry hold a root file system's tar file as an ordinary image too: one
// layer, with gzip. It takes a while, once.
func PublishPlain(ctx context.Context, server *regserver.Server, tar string, progress func(string)) (Image, error) {
	image := Image{Name: "demo/debian:plain"}
	var err error
	if image.Blobs, err = layers(ctx, server.Addr(), image.Name); err != nil {
		progress("packing the root file system with gzip and pushing it as an ordinary image")
		if err = pushPlain(ctx, server.Addr()+"/"+image.Name, tar); err == nil {
			image.Blobs, err = layers(ctx, server.Addr(), image.Name)
		}
	}
	for _, b := range image.Blobs {
		image.Size += b.Size
	}
	return image, err
}

func pushPlain(ctx context.Context, reference, tar string) (err error) {
	store, err := registry.New(registry.Options{PlainHTTP: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	p, err := store.Pusher(reference)
	if err != nil {
		return err
	}
	packed := filepath.Join(filepath.Dir(tar), "layer.tar.gz")
	defer func() { err = errors.Join(err, os.Remove(packed)) }()
	diff, layer, err := pack(packed, tar)
	if err != nil {
		return err
	}
	if err := p.Blob(ctx, layer, func() (io.ReadCloser, error) { return os.Open(packed) }); err != nil {
		return err
	}
	config, err := pushJSON(ctx, p.Blob, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diff}},
	})
	if err != nil {
		return err
	}
	text, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{layer},
	})
	if err != nil {
		return err
	}
	return p.Manifest(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(text), Size: int64(len(text))}, text)
}

// pack writes the file src with gzip into the file name, and returns the digest of what is in it.
func pack(name, src string) (diff digest.Digest, packed ocispec.Descriptor, err error) {
	in, err := os.Open(src)
	if err != nil {
		return "", packed, err
	}
	defer in.Close()
	out, err := os.Create(name)
	if err != nil {
		return "", packed, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	inner, outer := digest.Canonical.Digester(), digest.Canonical.Digester()
	zip := gzip.NewWriter(io.MultiWriter(out, outer.Hash()))
	if _, err := io.Copy(io.MultiWriter(zip, inner.Hash()), in); err != nil {
		return "", packed, fmt.Errorf("pack %s: %w", src, err)
	}
	if err := zip.Close(); err != nil {
		return "", packed, err
	}
	st, err := out.Stat()
	if err != nil {
		return "", packed, err
	}
	return inner.Digest(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: outer.Digest(), Size: st.Size()}, nil
}

// pushJSON stores v by push.
func pushJSON(ctx context.Context, push func(context.Context, ocispec.Descriptor, func() (io.ReadCloser, error)) error, kind string, v any) (d ocispec.Descriptor, err error) {
	text, err := json.Marshal(v)
	if err != nil {
		return d, err
	}
	d = ocispec.Descriptor{MediaType: kind, Digest: digest.FromBytes(text), Size: int64(len(text))}
	return d, push(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil })
}
