package power

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// An image is one of nydus's, and where it is mounted when it is.
type image struct {
	name  string
	bound bool // it is bound, and mounted by its name
	boot  string
	blobs string // directory
	tree  testenv.Tree
	files []string // the regular ones, sorted
	right *contents
	point string // where it is to be mounted
	id    string // once it was mounted
}

// images are those that the cache holds: by their bootstraps these of the fixtures, which
// have no blob in common, and a bound one.
func images(t *testing.T, names []string) (list []*image) {
	t.Helper()
	dir, points := testenv.Fixtures(t), t.TempDir()
	tree := testenv.LoadTree(t, "tree.jsonl")
	for _, name := range names {
		list = append(list, &image{name: name, tree: tree})
	}
	list = append(list, &image{name: "layered", tree: testenv.LoadTree(t, "layered.jsonl"), bound: true})
	right := &contents{known: map[string][]byte{}}
	for _, i := range list {
		i.right = right
		i.boot, i.blobs, i.point = filepath.Join(dir, i.name, "image.boot"), filepath.Join(dir, i.name, "blobs"), filepath.Join(points, i.name)
		for _, path := range slices.Sorted(maps.Keys(i.tree)) {
			if i.tree[path].Mode&unix.S_IFMT == unix.S_IFREG {
				i.files = append(i.files, path)
			}
		}
		if err := os.Mkdir(i.point, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return list
}

// mount has the daemon mount the image.
func (i *image) mount(t *testing.T, p *process) api.Mount {
	t.Helper()
	r := api.MountRequest{Mountpoint: i.point, Bootstrap: i.boot, BlobDir: i.blobs}
	if i.bound {
		r = api.MountRequest{Mountpoint: i.point, Image: i.name}
		if err := p.BindImage(t.Context(), api.BindRequest{ID: i.name, Bootstrap: i.boot, Config: i.config(t)}); err != nil {
			t.Fatalf("bind %s: %v", i.name, err)
		}
	}
	m, err := p.Mount(t.Context(), r)
	if err != nil {
		t.Fatalf("mount %s: %v", i.name, err)
	}
	i.id = m.ID
	return m
}

// config is nydus's, of a directory of blobs.
func (i *image) config(t *testing.T) json.RawMessage {
	t.Helper()
	backend := map[string]any{"type": "localfs", "config": map[string]any{"dir": i.blobs}}
	text, err := json.Marshal(map[string]any{
		"device": map[string]any{"id": "of-" + i.name, "backend": backend, "cache": map[string]any{"type": "fscache"}}, "mode": "direct",
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (i *image) unmount(t *testing.T, p *process) {
	t.Helper()
	if err := p.Unmount(t.Context(), api.UnmountRequest{Mountpoint: i.point}); err != nil {
		t.Fatalf("unmount %s: %v", i.name, err)
	}
}

// read reads some of its files and compares them.
func (i *image) read(files []string) error {
	for _, path := range files {
		if _, err := i.readFile(path); err != nil {
			return err
		}
	}
	return nil
}

// readFile reads a file and returns how many bytes it has if they are wrong.
func (i *image) readFile(path string) (wrong int64, err error) {
	p, err := os.ReadFile(filepath.Join(i.point, path))
	if err != nil {
		return 0, err
	}
	if want := i.tree[path].SHA256; !i.right.is(p, want) {
		return int64(len(p)), fmt.Errorf("wrong bytes: %s of image %s has the digest %x, want %s", path, i.name, sha256.Sum256(p), want)
	}
	return 0, nil
}

// compare reads everything and returns how many bytes lie in files that are wrong.
func (i *image) compare(t *testing.T) int64 {
	t.Helper()
	got, err := testenv.ScanTree(i.point, false)
	if err != nil {
		t.Error(err)
	} else {
		i.tree.Compare(t, got, false)
	}
	var wrong atomic.Int64
	var g errgroup.Group
	g.SetLimit(2 * runtime.NumCPU())
	for _, path := range i.files {
		g.Go(func() error {
			n, err := i.readFile(path)
			wrong.Add(n)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	return wrong.Load()
}

// state is the image's, mounted.
func (i *image) state(t *testing.T, p *process) api.Mount {
	t.Helper()
	st, err := p.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range st.Images {
		if m.Mountpoint == i.point {
			return m
		}
	}
	t.Fatalf("%s is not mounted", i.name)
	return api.Mount{}
}
