package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/internal/api"
)

// Annotations of a nydus image (rafs-v6-format 3.7).
const (
	annotationBootstrap = "containerd.io/snapshot/nydus-bootstrap"
	annotationVersion   = "containerd.io/snapshot/nydus-fs-version"
)

// Bounds of what an image may ask us to hold, in bytes.
const (
	maxBootstrapLayer = 128 << 20 // compressed
	maxTables         = 256 << 20 // chunk tables that come with the bootstrap, all together
)

// resolveReference asks the registry for the image's manifest and bootstrap layer.
func (d *Daemon) resolveReference(ctx context.Context, r api.MountRequest) (*source, error) {
	reg, err := d.stores.registry(r)
	if err != nil {
		return nil, err
	}
	m, err := reg.Manifest(ctx, r.Reference)
	if err != nil {
		return nil, fmt.Errorf("get manifest: %w", err)
	}
	layer, err := bootstrapLayer(m)
	if err != nil {
		return nil, api.BadRequest(err)
	}
	p, err := d.layer(ctx, reg, m, layer)
	if err != nil {
		return nil, fmt.Errorf("get bootstrap layer: %w", err)
	}
	src := &source{
		label: r.Reference, key: imageKey{domain: r.DomainID},
		record: record{
			Label: r.Reference, Host: m.Host, Repo: m.Repository, PlainHTTP: r.PlainHTTP, CAFile: r.CAFile,
			Sizes: map[string]int64{}, Layer: layerName(layer), Pinned: r.Pinned,
		},
	}
	src.origin = origin{store: reg.blobs, repo: backend.Ref{Host: m.Host, Repository: m.Repository}}
	for _, l := range m.Layers {
		if l.Digest.Validate() == nil {
			src.record.Sizes[l.Digest.Encoded()] = l.Size
		}
	}
	if err := d.unpackBootstrap(p, src); err != nil {
		return nil, fmt.Errorf("unpack bootstrap layer %s: %w", layer.Digest, err)
	}
	return src, nil
}

// bootstrapLayer finds the layer that holds the bootstrap.
func bootstrapLayer(m registry.Manifest) (ocispec.Descriptor, error) {
	for _, l := range m.Layers {
		if l.Annotations[annotationBootstrap] != "true" {
			continue
		}
		if v := l.Annotations[annotationVersion]; v != "" && v != "6" {
			return l, fmt.Errorf("image has RAFS version %q, the kernel can mount only 6: convert it again", v)
		}
		return l, nil
	}
	return ocispec.Descriptor{}, errors.New("not a lazy image: no layer has a nydus bootstrap; convert it with erofsctl convert")
}

// layerName is the file that the bootstrap layer l is kept in.
func layerName(l ocispec.Descriptor) string { return l.Digest.Encoded() + ".layer" }

// layer returns the bootstrap layer's bytes: from the daemon's directory if
// they are there and right, else from the registry.
func (d *Daemon) layer(ctx context.Context, reg *registryStore, m registry.Manifest, l ocispec.Descriptor) ([]byte, error) {
	if err := l.Digest.Validate(); err != nil {
		return nil, err
	}
	name := layerName(l)
	if p, err := d.imageDir.ReadFile(name); err == nil && l.Digest.Algorithm() == digest.SHA256 && digest.FromBytes(p) == l.Digest {
		return p, nil
	}
	p, err := reg.Fetch(ctx, m.Host, m.Repository, l, maxBootstrapLayer)
	if err != nil {
		return nil, err
	}
	if err := writeFile(d.imageDir, name, p); err != nil {
		d.log.Warn("cannot keep a bootstrap layer; it will be fetched again", "err", err)
	}
	return p, nil
}

// writeFile replaces the file name in dir with p, never leaving a part of it, whoever else
// does so.
func writeFile(dir *os.Root, name string, p []byte) error {
	tmp, err := os.CreateTemp(dir.Name(), partPattern)
	if err != nil {
		return err
	}
	part := filepath.Base(tmp.Name())
	_, err = tmp.Write(p)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = dir.Rename(part, name)
	}
	if err != nil {
		return errors.Join(err, dir.Remove(part))
	}
	return nil
}

// unpackBootstrap takes the bootstrap and the chunk tables out of a bootstrap
// layer, a tar or tar.gz.
func (d *Daemon) unpackBootstrap(p []byte, src *source) error {
	var r io.Reader = bytes.NewReader(p)
	if bytes.HasPrefix(p, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(r)
		if err != nil {
			return err
		}
		defer z.Close()
		r = z
	}
	src.tables = map[string][]byte{}
	left := int64(maxTables)
	for t := tar.NewReader(io.LimitReader(r, maxBootstrap+maxTables)); ; {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		name := path.Base(h.Name)
		switch id, isTable := strings.CutSuffix(name, ".blob.meta"); {
		case name == "image.boot" && src.boot == "":
			if err := d.keepBootstrap(t, src); err != nil {
				return err
			}
		case isTable && h.Size <= left: // without one it is read from the blob
			left -= h.Size
			if src.tables[id], err = io.ReadAll(t); err != nil {
				return err
			}
		}
	}
	if src.boot == "" {
		return errors.New("it has no image/image.boot")
	}
	return nil
}
