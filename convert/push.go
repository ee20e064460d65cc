package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/internal/chunk"
)

// Names of nydus images, rafs-v6-format 3.7.
const (
	mediaTypeBlob       = "application/vnd.oci.image.layer.nydus.blob.v1"
	annotationBlob      = "containerd.io/snapshot/nydus-blob"
	annotationBootstrap = "containerd.io/snapshot/nydus-bootstrap"
	annotationVersion   = "containerd.io/snapshot/nydus-fs-version"
)

// push stores the image in dest: blobs, bootstrap layer, configuration, and only
// then the manifest.
func (img *image) push(ctx context.Context, dest Destination, r *reporter) error {
	var layers []ocispec.Descriptor
	var diffs []digest.Digest
	total := len(img.blobs) + 1
	store := func(d ocispec.Descriptor, name string, diff digest.Digest) error {
		layers, diffs = append(layers, d), append(diffs, diff)
		m := r.meter(Event{Stage: StagePush, Name: d.Digest.Encoded()[:12], Layer: len(layers), Layers: total, Total: d.Size})
		return pushFile(ctx, dest, d, name, m)
	}
	for _, b := range img.blobs {
		d := ocispec.Descriptor{
			MediaType: mediaTypeBlob, Digest: digest.NewDigestFromEncoded(digest.SHA256, b.entry.ID), Size: b.size,
			Annotations: map[string]string{annotationBlob: "true"},
		}
		if err := store(d, b.path, d.Digest); err != nil {
			return err
		}
	}
	name := filepath.Join(img.stage, "bootstrap.tar.gz")
	d, diff, err := img.writeBootstrapLayer(ctx, name)
	if err != nil {
		return fmt.Errorf("write bootstrap layer: %w", err)
	}
	if err := store(d, name, diff); err != nil {
		return err
	}
	config, err := img.makeConfig(diffs)
	if err != nil {
		return err
	}
	configDesc := describe(ocispec.MediaTypeImageConfig, config)
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(config)), nil }
	if err := dest.Blob(ctx, configDesc, open); err != nil {
		return err
	}
	body, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: configDesc, Layers: layers,
	})
	if err != nil {
		return err
	}
	manifest := describe(ocispec.MediaTypeImageManifest, body)
	if err := dest.Manifest(ctx, manifest, body); err != nil {
		return err
	}
	img.result.Digest = manifest.Digest
	return nil
}

func describe(mediaType string, p []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
}

// pushFile stores the file name. A destination that opens it again begins anew.
func pushFile(ctx context.Context, dest Destination, d ocispec.Descriptor, name string, m *meter) error {
	err := dest.Blob(ctx, d, func() (io.ReadCloser, error) {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		m.restart()
		return struct {
			io.Reader
			io.Closer
		}{&passReader{f, m.add}, f}, nil
	})
	if err == nil {
		m.end()
	}
	return err
}

// writeBootstrapLayer writes the tar.gz that carries the bootstrap and, so that
// a client needs no request for them, the chunk tables of the blobs.
func (img *image) writeBootstrapLayer(ctx context.Context, name string) (d ocispec.Descriptor, diff digest.Digest, err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return d, "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	stored, plain, size := sha256.New(), sha256.New(), &counter{}
	z := gzip.NewWriter(io.MultiWriter(f, stored, size))
	t := tar.NewWriter(io.MultiWriter(z, plain))
	if err := img.writeBootstrapTar(ctx, t); err != nil {
		return d, "", err
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return d, "", err
	}
	return ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.NewDigest(digest.SHA256, stored), Size: size.n,
		Annotations: map[string]string{annotationBootstrap: "true", annotationVersion: "6"},
	}, digest.NewDigest(digest.SHA256, plain), nil
}

func (img *image) writeBootstrapTar(ctx context.Context, t *tar.Writer) error {
	epoch := time.Unix(0, 0)
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "image/", Mode: 0o755, ModTime: epoch}); err != nil {
		return err
	}
	f, err := os.Open(img.bootstrap)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "image/" + bootstrapName, Mode: 0o444, ModTime: epoch, Size: st.Size()}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	if _, err := io.Copy(t, &ctxReader{ctx, f}); err != nil {
		return err
	}
	for _, b := range img.blobs {
		p, err := b.localTable(ctx)
		if err != nil {
			return fmt.Errorf("read back blob %s: %w", b.entry.ID, err)
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: "image/" + b.entry.ID + ".blob.meta", Mode: 0o444, ModTime: epoch, Size: int64(len(p))}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := t.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// localTable reads the chunk table out of the blob that was written, as a client
// would, and returns its local form.
func (b *packedBlob) localTable(ctx context.Context) ([]byte, error) {
	f, err := os.Open(b.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, err := chunk.ReadTable(ctx, blobFile{f, b.size}, b.entry)
	if err != nil {
		return nil, err
	}
	return t.Marshal(), nil
}

// A blobFile is a chunk.ReaderAt.
type blobFile struct {
	f    *os.File
	size int64
}

func (b blobFile) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := b.f.ReadAt(p, off)
	return err
}

func (b blobFile) Size() int64 { return b.size }

// makeConfig is the image's configuration: that of the source, whatever it
// holds, with the diff ids and the history of the new layers.
func (img *image) makeConfig(diffs []digest.Digest) ([]byte, error) {
	config := map[string]any{"architecture": runtime.GOARCH, "os": "linux", "config": struct{}{}}
	var old struct {
		History []ocispec.History `json:"history"`
	}
	if img.config != nil {
		var fields map[string]json.RawMessage
		if err := errors.Join(json.Unmarshal(img.config, &fields), json.Unmarshal(img.config, &old)); err != nil {
			return nil, fmt.Errorf("read the image's configuration: %w", err)
		}
		for k, v := range fields {
			config[k] = v
		}
	}
	config["rootfs"] = ocispec.RootFS{Type: "layers", DiffIDs: diffs}
	config["history"] = img.history(old.History)
	return json.Marshal(config)
}

// history says what made each layer: old as far as it fits to the source's
// layers, then an entry for the bootstrap. Layers without a blob are empty now.
func (img *image) history(old []ocispec.History) []ocispec.History {
	var list []ocispec.History
	layer := 0
	for _, h := range old {
		if !h.EmptyLayer {
			if layer < len(img.layerHas) && !img.layerHas[layer] {
				h.EmptyLayer = true
			}
			layer++
		}
		list = append(list, h)
	}
	const by = "erofsctl convert"
	if layer != len(img.layerHas) {
		list = nil
		for range img.blobs {
			list = append(list, ocispec.History{CreatedBy: by})
		}
	}
	return append(list, ocispec.History{CreatedBy: by, Comment: "bootstrap"})
}
