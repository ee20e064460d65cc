package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"io/fs"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/erofsd/erofsd/backend/backendtest"
	erofsdregistry "github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// converted converts src into a directory and returns how to mount it.
func converted(t testing.TB, src string) api.MountRequest {
	t.Helper()
	dir := filepath.Join(newRoot(t), "image")
	if _, err := convert.ConvertToDir(t.Context(), src, dir, convert.Options{}); err != nil {
		t.Fatal(err)
	}
	return api.MountRequest{Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: filepath.Join(dir, "blobs")}
}

// testRegistry is a registry that can be made to fail.
type testRegistry struct {
	*backendtest.HTTPFaults
	host string
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	faults := backendtest.NewHTTPFaults(registry.New(registry.Logger(quiet())))
	srv := httptest.NewServer(faults)
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
	})
	return &testRegistry{faults, strings.TrimPrefix(srv.URL, "http://")}
}

// push converts src and pushes it.
func (r *testRegistry) push(t testing.TB, src, name string) api.MountRequest {
	t.Helper()
	store, err := erofsdregistry.New(erofsdregistry.Options{PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	ref := r.host + "/" + name
	p, err := store.Pusher(ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := convert.Convert(t.Context(), src, p, convert.Options{}); err != nil {
		t.Fatal(err)
	}
	return api.MountRequest{Reference: ref, PlainHTTP: true}
}

// fixtureTree copies the tree behind the fixtures out of the kernel, so that our
// own converter has the very same input.
func fixtureTree(t testing.TB, d *testDaemon) string {
	t.Helper()
	m := d.mount(t, localRequest(t, "zstd"))
	dir := filepath.Join(newRoot(t), "tree")
	if out, err := exec.Command("cp", "-a", m, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

// TestConverted: the fixtures' tree converted by us, from a directory and from a
// tar, reads the same through the kernel, and fsck.erofs accepts it.
func TestConverted(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	tree := fixtureList(t)
	dir := fixtureTree(t, d)
	tar := filepath.Join(newRoot(t), "tree.tar")
	cmd := exec.Command("tar", "--xattrs", "--xattrs-include=*", "--format=posix", "-C", dir, "-cf", tar, ".")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, src := range map[string]string{"directory": dir, "tar": tar} {
		t.Run(name, func(t *testing.T) {
			r := converted(t, src)
			m := d.mount(t, r)
			compareTree(t, tree, m)
			goErofs(t, tree, r.Bootstrap, filepath.Join(d.root, "cache", d.image(t, m).Blobs[0].ID))
			fsck := testenv.Tool(t, "fsck.erofs")
			if out, err := exec.Command(fsck, append(deviceArgs(t, r), r.Bootstrap)...).CombinedOutput(); err != nil {
				t.Errorf("fsck.erofs: %v: %s", err, out)
			}
		})
	}
}

// goErofs reads every file by another implementation: metadata from the
// bootstrap, data from the cache file.
func goErofs(t testing.TB, tree testenv.Tree, bootstrap, cache string) {
	t.Helper()
	boot, err := os.Open(bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	defer boot.Close()
	data, err := os.Open(cache)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	fsys, err := goerofs.Open(boot, goerofs.WithExtraDevices(data))
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	err = fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		seen++
		want, ok := tree[p]
		if !ok {
			t.Errorf("go-erofs: %s should not be there", p)
		}
		if want.SHA256 == "" {
			return nil
		}
		content, err := fs.ReadFile(fsys, p)
		if sum := sha256.Sum256(content); err != nil || hex.EncodeToString(sum[:]) != want.SHA256 {
			t.Errorf("go-erofs: %s: wrong content, %v", p, err)
		}
		return nil
	})
	if err != nil || seen != len(tree) {
		t.Errorf("go-erofs: %d paths of %d, %v", seen, len(tree), err)
	}
}

// deviceArgs names the blobs to fsck.erofs, which looks at the metadata and at
// the devices' number.
func deviceArgs(t testing.TB, r api.MountRequest) (args []string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(r.BlobDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		args = append(args, "--device="+n)
	}
	return args
}

// TestConvertedLayers: an OCI image of the fixtures' three layers, from a
// registry, reads like the fixture that nydus merged.
func TestConvertedLayers(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	fixtures := testenv.Fixtures(t)
	layout := ociLayout(t, filepath.Join(fixtures, "layers", "1.tar.gz"), filepath.Join(fixtures, "layers", "2.tar.gz"), filepath.Join(fixtures, "layers", "3.tar.gz"))
	m := d.mount(t, newRegistry(t).push(t, layout, "team/layers:1"))
	compareTree(t, testenv.LoadTree(t, "layered.jsonl"), m)
	if n := len(d.image(t, m).Blobs); n < 2 {
		t.Errorf("three layers made %d blobs", n)
	}
}

// smallTree makes a directory with a few files whose bytes do not compress.
func smallTree(t testing.TB) (dir string, files map[string][]byte) {
	t.Helper()
	dir, files = filepath.Join(newRoot(t), "tree"), map[string][]byte{}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"a", "b", "c"} {
		files[name] = backendtest.Bytes(1<<20+i, uint64(i))
		if err := os.WriteFile(filepath.Join(dir, name), files[name], 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, files
}
