package containerd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// seed is what the images are made from.
const seed = 7

// A world is programs and images.
type world struct {
	dir   string // short: sockets are in it
	bin   string
	addr  string // of the registry
	lazy  string // references
	other string // lazy too; it shares the data of lazy
	plain string
	want  string // what check prints in a container of any of them
}

// newWorld makes it, or skips t where it cannot be.
func newWorld(t *testing.T) *world {
	t.Helper()
	testenv.Root(t)
	dir, err := os.MkdirTemp("", "ectr-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
	services.Containerd(t)
	w := &world{dir: dir, bin: filepath.Join(dir, "bin")}
	w.addr = services.Registry(t, services.RegistryOptions{}).Addr
	w.build(t, w.bin+"/", "./cmd/containerd-erofsd-grpc", "./cmd/erofsd")
	src := filepath.Join(dir, "src")
	w.want = w.tree(t, src)
	w.lazy, w.plain = w.addr+"/app:lazy", w.addr+"/app:plain"
	w.convert(t, src, w.lazy)
	w.push(t, src, w.plain)
	if err := os.WriteFile(filepath.Join(src, "other"), []byte("another image"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.other = w.addr + "/other/app:lazy"
	w.convert(t, src, w.other)
	return w
}

// build builds packages of this module.
func (w *world) build(t *testing.T, out string, packages ...string) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"build", "-o", out}, packages...)...)
	cmd.Dir = testenv.ModuleRoot(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
}

// tree makes the root file system of the images: check, and 8 MB that do not compress.
func (w *world) tree(t *testing.T, src string) (want string) {
	t.Helper()
	w.build(t, filepath.Join(src, "bin", "check"), "./kernel-tests/containerd/testdata/check")
	if err := os.Mkdir(filepath.Join(src, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	all, rnd := sha256.New(), rand.NewChaCha8([32]byte{seed})
	for i := range 40 {
		p := make([]byte, 200_000+1_000*i)
		_, _ = rnd.Read(p) // never fails
		name := fmt.Sprintf("/data/%02d", i)
		if err := os.WriteFile(filepath.Join(src, name), p, 0o644); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(all, "%s %x\n", name, sha256.Sum256(p))
	}
	return fmt.Sprintf("read %x\n", all.Sum(nil))
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

// convert pushes src as a lazy image.
func (w *world) convert(t *testing.T, src, reference string) {
	t.Helper()
	if _, err := convert.Convert(t.Context(), src, w.pusher(t, reference), convert.Options{ChunkSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
}

// push pushes src as an ordinary image of one layer.
func (w *world) push(t *testing.T, src, reference string) {
	t.Helper()
	var plain bytes.Buffer
	archive := tar.NewWriter(&plain)
	var packed bytes.Buffer
	zip := gzip.NewWriter(&packed)
	err := errors.Join(archive.AddFS(os.DirFS(src)), archive.Close())
	if err == nil {
		_, err = zip.Write(plain.Bytes())
	}
	if err = errors.Join(err, zip.Close()); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(plain.Bytes())}},
	})
	if err != nil {
		t.Fatal(err)
	}
	p := w.pusher(t, reference)
	blob := func(kind string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: kind, Digest: digest.FromBytes(b), Size: int64(len(b))}
		open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
		if err := p.Blob(context.WithoutCancel(t.Context()), d, open); err != nil {
			t.Fatal(err)
		}
		return d
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: blob(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{blob(ocispec.MediaTypeImageLayerGzip, packed.Bytes())},
	})
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	if err := p.Manifest(t.Context(), d, manifest); err != nil {
		t.Fatal(err)
	}
}

// tail is the end of a log.
func tail(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}
