package convert

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxDocument  = 4 << 20 // bytes of a manifest, an index or a configuration
	maxIndexes   = 4       // indexes inside indexes
	maxOCILayers = 127     // what container runtimes can stack
)

// openLayout reads the OCI layout directory dir: the image for this machine's
// architecture. URLs that a manifest offers are not followed.
func openLayout(dir string) (*source, error) {
	doc, err := readDocument(filepath.Join(dir, ocispec.ImageIndexFile))
	if err != nil {
		return nil, err
	}
	var manifest ocispec.Manifest
	for range maxIndexes {
		var index ocispec.Index
		if err := json.Unmarshal(doc, &index); err != nil {
			return nil, fmt.Errorf("%s: read index: %w", dir, err)
		}
		d, err := choose(index.Manifests)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		if doc, err = readObject(dir, d); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(doc, &manifest); err != nil {
			return nil, fmt.Errorf("%s: read manifest %s: %w", dir, d.Digest, err)
		}
		if len(manifest.Layers) > 0 || manifest.Config.Digest != "" {
			return layoutImage(dir, manifest)
		}
	}
	return nil, fmt.Errorf("%s: no image within %d indexes", dir, maxIndexes)
}

// choose picks the image for linux and this architecture. One that stands alone
// and says nothing is taken as it is.
func choose(list []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var known []string
	for _, d := range list {
		p := d.Platform
		if p == nil {
			if len(list) == 1 {
				return d, nil
			}
			continue
		}
		if p.OS == "linux" && p.Architecture == runtime.GOARCH {
			return d, nil
		}
		known = append(known, p.OS+"/"+p.Architecture)
	}
	if len(known) == 0 {
		return ocispec.Descriptor{}, errors.New("index lists several images or none, and no platforms: keep one image in the layout")
	}
	return ocispec.Descriptor{}, fmt.Errorf("no image for linux/%s, only for %s", runtime.GOARCH, strings.Join(known, ", "))
}

func layoutImage(dir string, m ocispec.Manifest) (*source, error) {
	if len(m.Layers) == 0 || len(m.Layers) > maxOCILayers {
		return nil, fmt.Errorf("%s: image has %d layers, 1 to %d can be converted", dir, len(m.Layers), maxOCILayers)
	}
	config, err := readObject(dir, m.Config)
	if err != nil {
		return nil, err
	}
	src := &source{config: config}
	for _, d := range m.Layers {
		if !plainLayer(d.MediaType) {
			return nil, fmt.Errorf("%s: layer %s is %q: only tar layers, gzip, zstd or plain, can be converted", dir, d.Digest, d.MediaType)
		}
		name, err := objectPath(dir, d.Digest)
		if err != nil {
			return nil, err
		}
		st, err := os.Stat(name)
		if err != nil {
			return nil, fmt.Errorf("layer: %w", err)
		}
		if st.Size() != d.Size {
			return nil, fmt.Errorf("%s has %d bytes, the manifest says %d", name, st.Size(), d.Size)
		}
		src.layers = append(src.layers, tarSource(name, d.Digest.Encoded()[:12], d.Size, d.Digest))
	}
	return src, nil
}

// plainLayer says whether a layer of this media type is a tar. Which compression
// it has shows its content.
func plainLayer(mediaType string) bool {
	switch mediaType {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
		"application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
		"application/vnd.docker.image.rootfs.diff.tar",
		"application/vnd.docker.image.rootfs.diff.tar.gzip",
		"application/vnd.docker.image.rootfs.diff.tar.zstd":
		return true
	}
	return false
}

func objectPath(dir string, d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("%s: digest %.100q: %w", dir, d, err)
	}
	return filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded()), nil
}

// readObject reads the small object d and verifies it.
func readObject(dir string, d ocispec.Descriptor) ([]byte, error) {
	name, err := objectPath(dir, d.Digest)
	if err != nil {
		return nil, err
	}
	p, err := readDocument(name)
	if err != nil {
		return nil, err
	}
	if d.Digest.Algorithm().FromBytes(p) != d.Digest {
		return nil, fmt.Errorf("%s: content is not %s: fetch the image again", name, d.Digest)
	}
	return p, nil
}

func readDocument(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err == nil && len(p) > maxDocument {
		err = fmt.Errorf("%s is larger than %d bytes", name, maxDocument)
	}
	return p, err
}
