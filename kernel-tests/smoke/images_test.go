package smoke

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/internal/testenv"
)

// An image is a bootstrap and its blobs on disk, and what must be read of it.
type image struct {
	name  string
	boot  string            // path of the bootstrap
	dir   string            // of the blobs
	blobs []string          // their ids
	files map[string]string // contents by path; nil: tree says all
	tree  testenv.Tree
}

// images makes images, each once. Its methods are safe for concurrent use.
type images struct {
	dir string

	mu   sync.Mutex // held while an image is made; guards made
	made map[string]*image
}

func newImages(t *testing.T) *images {
	return &images{dir: t.TempDir(), made: map[string]*image{}}
}

// get returns the image of that name: its data come from data, so that images of the
// same data share their blob, and a file in it says its name.
func (im *images) get(t testing.TB, name, data string) *image {
	t.Helper()
	im.mu.Lock()
	defer im.mu.Unlock()
	if i := im.made[name]; i != nil {
		return i
	}
	i := &image{name: name, files: contents(data)}
	dir := filepath.Join(im.dir, name)
	src := dir + ".tar"
	if err := writeTar(src, name, i.files); err != nil {
		t.Fatal(err)
	}
	if _, err := convert.ConvertToDir(t.Context(), src, dir, convert.Options{Compressor: "none"}); err != nil {
		t.Fatal(err)
	}
	i.boot, i.dir = filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs")
	i.blobs = blobsIn(t, i.dir)
	im.made[name] = i
	return i
}

// contents makes a megabyte of files from a seed.
func contents(seed string) map[string]string {
	var key [32]byte
	copy(key[:], seed)
	rnd := rand.NewChaCha8(key)
	random := func(n int) string {
		p := make([]byte, n)
		_, _ = rnd.Read(p) // never fails
		return string(p)
	}
	return map[string]string{
		"big": random(900_000), "dir/middle": random(100_001), "dir/small": "of " + seed + "\n", "empty": "",
		"text": strings.Repeat("line of "+seed+"\n", 1000),
	}
}

func writeTar(file, name string, files map[string]string) error {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, d := range []string{"dir", "nested"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755}); err != nil {
			return err
		}
	}
	link := &tar.Header{Typeflag: tar.TypeSymlink, Name: "name", Linkname: name, Mode: 0o777}
	if err := w.WriteHeader(link); err != nil {
		return err
	}
	for _, path := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: path, Size: int64(len(files[path])), Mode: 0o644}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write([]byte(files[path])); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(file, b.Bytes(), 0o600)
}

func blobsIn(t testing.TB, dir string) (ids []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

// fixture is one of nydus's own images.
func fixture(t testing.TB, name string) *image {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), name)
	i := &image{name: name, boot: filepath.Join(dir, "image.boot"), dir: filepath.Join(dir, "blobs")}
	list := "tree.jsonl"
	if name == "layered" {
		list = "layered.jsonl"
	}
	i.blobs, i.tree = blobsIn(t, i.dir), testenv.LoadTree(t, list)
	return i
}

// compare reads everything below a directory and compares it with the image.
func (i *image) compare(t testing.TB, dir string) {
	t.Helper()
	if i.tree != nil {
		got, err := testenv.ScanTree(dir, true)
		if err != nil {
			t.Fatal(err)
		}
		i.tree.Compare(t, got, false)
		return
	}
	if err := i.read(dir); err != nil {
		t.Error(err)
	}
}

// read is compare of an image of ours, in any goroutine.
func (i *image) read(dir string) error {
	link, err := os.Readlink(filepath.Join(dir, "name"))
	if err != nil {
		return err
	}
	if link != i.name {
		return fmt.Errorf("this is image %s, want %s", link, i.name)
	}
	seen := 0
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		seen++
		return i.readFile(dir, name)
	})
	if err == nil && seen != len(i.files) {
		err = fmt.Errorf("image %s has %d files, want %d", i.name, seen, len(i.files))
	}
	return err
}

func (i *image) readFile(dir, name string) error {
	p, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	if want, ok := i.files[name]; !ok || want != string(p) {
		return fmt.Errorf("%s of image %s: %d wrong bytes", name, i.name, len(p))
	}
	return nil
}

// localfs is the configuration of a directory of blobs, as nydus-snapshotter writes it.
func (i *image) localfs() (kind string, config json.RawMessage) {
	p, _ := json.Marshal(map[string]any{"dir": i.dir, "readahead": false, "proxy": map[string]any{"fallback": false}})
	return "localfs", p
}
