package convert

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// makeLayout writes an OCI layout of one image and returns its directory.
func makeLayout(t testing.TB, config map[string]any, layers ...[]byte) string {
	t.Helper()
	dir := t.TempDir()
	put := func(mediaType string, p []byte) ocispec.Descriptor {
		d := describe(mediaType, p)
		writeFile(t, filepath.Join(dir, "blobs", "sha256", d.Digest.Encoded()), p)
		return d
	}
	if config == nil {
		config = map[string]any{"architecture": runtime.GOARCH, "os": "linux"}
	}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: put(ocispec.MediaTypeImageConfig, toJSON(t, config))}
	m.SchemaVersion = 2
	for _, l := range layers {
		m.Layers = append(m.Layers, put(ocispec.MediaTypeImageLayerGzip, l))
	}
	d := put(ocispec.MediaTypeImageManifest, toJSON(t, m))
	writeFile(t, filepath.Join(dir, "index.json"), toJSON(t, ocispec.Index{Manifests: []ocispec.Descriptor{d}}))
	writeFile(t, filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return dir
}

func TestLayout(t *testing.T) {
	layer := append(makeTar(t, reg("a", "1")), make([]byte, 512)...)
	platform := func(os, arch string) *ocispec.Platform { return &ocispec.Platform{OS: os, Architecture: arch} }
	d := func(p *ocispec.Platform) ocispec.Descriptor {
		return ocispec.Descriptor{Digest: digest.FromString(fmt.Sprint(p)), Platform: p}
	}
	own, other, windows := d(platform("linux", runtime.GOARCH)), d(platform("linux", "mips")), d(platform("windows", runtime.GOARCH))
	for _, c := range []struct {
		list []ocispec.Descriptor
		want string // error
	}{
		{[]ocispec.Descriptor{d(nil)}, ""},
		{[]ocispec.Descriptor{other, windows, own}, ""},
		{[]ocispec.Descriptor{other}, "only for linux/mips"},
		{[]ocispec.Descriptor{d(nil), d(nil)}, "several images"},
		{nil, "several images or none"},
	} {
		got, err := choose(c.list)
		if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) || c.want == "" && err != nil {
			t.Errorf("error %v, want %q", err, c.want)
		}
		if err == nil && len(c.list) > 1 && got.Digest != own.Digest {
			t.Errorf("chose %v", got.Platform)
		}
	}
	for name, c := range map[string]struct {
		breakIt func(dir, layer string)
		want    string
	}{
		"layer has other bytes": {func(dir, layer string) {
			p, _ := os.ReadFile(layer)
			p[len(p)-1] ^= 1 // behind the tar's end
			writeFile(t, layer, p)
		}, "fetch the image again"},
		"layer is short":   {func(_, layer string) { os.Truncate(layer, 100) }, "the manifest says"},
		"layer is missing": {func(_, layer string) { os.Remove(layer) }, "no such file"},
		"index is large":   {func(dir, _ string) { os.Truncate(filepath.Join(dir, "index.json"), maxDocument+1) }, "larger than"},
		"manifest of another": {func(dir, _ string) {
			list, _ := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
			for _, f := range list {
				if p, _ := os.ReadFile(f); bytes.Contains(p, []byte("mediaType")) {
					writeFile(t, f, append(p, ' '))
				}
			}
		}, "content is not"},
		"evil digest": {func(dir, _ string) {
			writeFile(t, filepath.Join(dir, "index.json"), []byte(`{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}`))
		}, "digest"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := makeLayout(t, nil, layer)
			c.breakIt(dir, filepath.Join(dir, "blobs", "sha256", digest.FromBytes(layer).Encoded()))
			if _, err := ConvertToDir(t.Context(), dir, filepath.Join(t.TempDir(), "image"), Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}
