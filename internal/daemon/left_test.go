package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// asCachefiles has the root of a daemon that has ended look as one with cachefiles leaves
// it: the cache files of r's blob and bootstrap are the kernel's. It returns their names.
func asCachefiles(t *testing.T, root string, r api.MountRequest) (blob, boot string) {
	t.Helper()
	place := func(id string) string {
		k := cachefiles.Key{Volume: cachefiles.VolumeKey(defaultDomain, ""), Cookie: id}
		name := filepath.Join(root, "fscache", k.Path())
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		return name
	}
	boots, err := filepath.Glob(filepath.Join(root, "images", "*"+bootSuffix))
	if err != nil || len(boots) != 1 {
		t.Fatalf("bootstraps %q, %v", boots, err)
	}
	id := filepath.Base(onlyBlob(t, r))
	ours := filepath.Join(root, "cache", id)
	blob, boot = place(id), place(strings.TrimSuffix(filepath.Base(boots[0]), bootSuffix))
	content, err := os.ReadFile(boots[0])
	err = errors.Join(err, os.Rename(ours, blob), os.Chmod(blob, 0), os.Remove(ours+".clean"), os.WriteFile(boot, content, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return blob, boot
}

// filled is a root in which a daemon has filled all of r, and has ended.
func filled(t *testing.T, r api.MountRequest) (root string) {
	t.Helper()
	d := startDaemon(t, daemonOptions{})
	if err := fanotify.Supported(d.root); err != nil {
		testenv.Kernel(t, "fanotify", err)
	}
	m := d.mount(t, r)
	compareTree(t, fixtureList(t), m)
	await(t, "the image to be complete", func() bool { return d.image(t, m).Complete })
	d.umount(t, m)
	d.stop(t)
	return d.root
}

// TestLeftOfCachefiles: what cachefiles has kept is listed, counted and used, and goes with
// its image or once it is used up.
func TestLeftOfCachefiles(t *testing.T) {
	r := localRequest(t, "zstd")
	root := filled(t, r)
	blob, boot := asCachefiles(t, root, r)
	if err := os.Rename(r.BlobDir, r.BlobDir+"-away"); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, daemonOptions{root: root})
	c, err := d.Cache(t.Context())
	if err != nil || c.Images != 1 || c.Bytes < 1<<20 {
		t.Errorf("the cache has %+v (%v)", c, err)
	}
	m := d.mount(t, r)
	compareTree(t, fixtureList(t), m)
	if s := d.image(t, m); s.BackendRequests != 0 {
		t.Errorf("%d requests for what cachefiles has kept", s.BackendRequests)
	}
	await(t, "the image to be complete", func() bool { return d.image(t, m).Complete })
	await(t, "the kernel's file to go", func() bool { return !exists(blob) })
	if !exists(boot) {
		t.Error("the bootstrap's object is gone already")
	}
	d.umount(t, m)
	d.remove(t, api.RemoveRequest{Image: r.Bootstrap})
	if left := cachedFiles(t, root); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestLeftIsRemoved: also of an image that was never mounted since.
func TestLeftIsRemoved(t *testing.T) {
	r := localRequest(t, "zstd")
	root := filled(t, r)
	asCachefiles(t, root, r)
	d := startDaemon(t, daemonOptions{root: root})
	c, err := d.Evict(t.Context(), api.EvictRequest{})
	if err != nil || c.Bytes != 0 || c.Images != 0 {
		t.Errorf("the cache has %+v (%v) after everything was evicted", c, err)
	}
	if left := cachedFiles(t, root); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if exists(filepath.Join(root, "fscache", cachefiles.VolumePath(cachefiles.VolumeKey(defaultDomain, "")))) {
		t.Error("the volume's directory is left behind")
	}
}

// TestLeftGoesFirst: when room is needed, what is there twice goes before anything else.
func TestLeftGoesFirst(t *testing.T) {
	r, other := localRequest(t, "zstd"), localRequest(t, "none")
	root := filled(t, r)
	blob, _ := asCachefiles(t, root, r)
	d := startDaemon(t, daemonOptions{root: root})
	n := d.mount(t, other)
	compareBig(t, n)
	d.umount(t, n)
	await(t, "the end of the image's use", func() bool {
		st, err := d.Status(t.Context())
		return err == nil && !slices.ContainsFunc(st.Kept, func(k api.Kept) bool { return k.InUse })
	})
	m := d.mount(t, r)
	compareBig(t, m)
	if !exists(blob) {
		t.Fatal("the kernel's file is gone though only one file was read")
	}
	before, err := d.Cache(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	after, err := d.Evict(t.Context(), api.EvictRequest{Target: before.Bytes - 1})
	if err != nil || exists(blob) || after.Images != 2 || after.Bytes >= before.Bytes {
		t.Errorf("the cache has %+v, before %+v (%v); the kernel's file is there: %v", after, before, err, exists(blob))
	}
	compareTree(t, fixtureList(t), m) // the rest is fetched
	if d.image(t, m).BackendRequests == 0 {
		t.Error("nothing was fetched: it did not go")
	}
}
