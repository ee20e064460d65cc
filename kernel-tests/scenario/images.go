package scenario

import (
	"context"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/regserver"
)

// seed is what the trees are made from.
const seed = 4

// Images makes images, each once, in a registry's directory. Its methods are safe for
// concurrent use.
type Images struct {
	dir string

	mu   sync.Mutex // held while an image is made; guards made
	made map[string]*tree
}

// NewImages returns an Images whose files last as long as t.
func NewImages(t testing.TB) *Images {
	return &Images{dir: t.TempDir(), made: map[string]*tree{}}
}

// get returns the tree of the image with that name; make is called for the first time.
func (im *Images) get(t testing.TB, name string, make func() *tree) *tree {
	t.Helper()
	im.mu.Lock()
	defer im.mu.Unlock()
	if tr := im.made[name]; tr != nil {
		return tr
	}
	tr := make()
	srv, err := regserver.New(filepath.Join(im.dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	store, err := registry.New(registry.Options{PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	p, err := store.Pusher(reference(srv.Addr(), name))
	if err != nil {
		t.Fatal(err)
	}
	src := filepath.Join(im.dir, name+".tar")
	if err := tr.writeTar(src); err != nil {
		t.Fatal(err)
	}
	if _, err := convert.Convert(t.Context(), src, p, convert.Options{TempDir: im.dir}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(src); err != nil {
		t.Fatal(err)
	}
	im.made[name] = tr
	return tr
}

func reference(host, name string) string { return host + "/scenario/" + name + ":1" }

// standard is the image that most scenarios read. Seed: see the constant.
func (im *Images) standard(t testing.TB) *tree {
	return im.get(t, "standard", func() *tree { return standardTree(seed, program(t)) })
}

// program returns a program that needs nothing but a kernel, if there is one.
func program(t testing.TB) []byte {
	t.Helper()
	for _, name := range []string{"/bin/busybox", "/bin/true"} {
		if p, err := os.ReadFile(name); err == nil {
			return p
		}
	}
	testenv.Need(t, "true", "needs the program /bin/true or /bin/busybox")
	return nil
}

// A server is a registry with the images, which can be made to fail. What was fetched
// is counted twice: here, from outside, and by the daemon.
type server struct {
	*backendtest.HTTPFaults
	count *regserver.Server
	host  string
}

// serve starts a registry that ends with the test. The images have been made before.
func (im *Images) serve(t testing.TB) *server {
	t.Helper()
	im.mu.Lock()
	defer im.mu.Unlock()
	reg, err := regserver.New(filepath.Join(im.dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	faults := backendtest.NewHTTPFaults(reg)
	front := httptest.NewServer(faults)
	t.Cleanup(func() {
		front.CloseClientConnections() // a request that is held back ends
		front.Close()
		reg.Close()
	})
	return &server{faults, reg, strings.TrimPrefix(front.URL, "http://")}
}

func (s *server) request(name string) api.MountRequest {
	return api.MountRequest{Reference: reference(s.host, name), PlainHTTP: true}
}

// blobReads is how many requests for blobs there were.
func (s *server) blobReads() int {
	_, n := s.Requests()
	return n
}

// blob is what was fetched of the one blob of a mounted image, while nobody fetches.
func (s *server) blob(t testing.TB, m api.Mount) regserver.Blob {
	t.Helper()
	if len(m.Blobs) != 1 {
		t.Fatalf("want one blob: %+v", m)
	}
	var stats regserver.Stats
	await(t, "the registry to have counted everything", func() bool {
		stats = s.count.Stats()
		return stats.Active == 0
	})
	return stats.Blobs["sha256:"+m.Blobs[0].ID]
}

// blobSize is the size of the one blob of a mounted image, as stored.
func (im *Images) blobSize(t testing.TB, m api.Mount) int64 {
	t.Helper()
	st, err := os.Stat(filepath.Join(im.dir, "registry", "blobs", m.Blobs[0].ID))
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// directory converts a tree into a directory of its own, without compressing it: that
// would take most of the time.
func directory(ctx context.Context, tr *tree, dir string) (api.MountRequest, error) {
	src := dir + ".tar"
	if err := tr.writeTar(src); err != nil {
		return api.MountRequest{}, err
	}
	_, err := convert.ConvertToDir(ctx, src, dir, convert.Options{Compressor: "none"})
	return api.MountRequest{Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: filepath.Join(dir, "blobs")}, err
}

// fixture is how one of nydus's own images is mounted, and what it holds.
func fixture(t testing.TB, name string) (api.MountRequest, testenv.Tree) {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), name)
	list := "tree.jsonl"
	if name == "layered" {
		list = "layered.jsonl"
	}
	want := testenv.LoadTree(t, list)
	return api.MountRequest{Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: filepath.Join(dir, "blobs")}, want
}

func tinyName(i int) string { return fmt.Sprintf("tiny-%03d", i) }
