package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
)

// compareBig reads the fixtures' largest file, which is faster than the whole tree.
func compareBig(t testing.TB, dir string) {
	t.Helper()
	const name = "big/rand-2m"
	p, err := readAll(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(p); hex.EncodeToString(sum[:]) != fixtureList(t)[name].SHA256 {
		t.Fatalf("%s has wrong bytes", name)
	}
}

// cachedFiles lists what a root keeps of images: nothing of the kernel's own
// directories, but every file in them.
func cachedFiles(t testing.TB, root string) (names []string) {
	t.Helper()
	for _, dir := range []string{"images", "cache", "fscache/cache", "fscache/graveyard"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(name string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() && e.Name() != ",running" {
				names = append(names, strings.TrimPrefix(name, root+"/"))
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return names
}

func status(err error) int {
	if e := (*api.Error)(nil); errors.As(err, &e) {
		return e.Status
	}
	return 0
}

// removed waits until image can be removed: the kernel lets go of it a little after
// the unmount.
func (d *testDaemon) remove(t testing.TB, r api.RemoveRequest) {
	t.Helper()
	await(t, "the end of the image's use", func() bool {
		err := d.Remove(t.Context(), r)
		if err != nil && status(err) != http.StatusConflict {
			t.Fatalf("%v\n%s", err, d.log)
		}
		return err == nil
	})
}

// TestRemove: an image that is removed leaves nothing behind, but what another image
// of its domain needs.
func TestRemove(t *testing.T) {
	d := startDaemon(t, daemonOptions{completion: true})
	zstd, none := localRequest(t, "zstd"), localRequest(t, "none")
	m := d.mount(t, zstd)
	compareBig(t, m)
	id := d.image(t, m).ID
	if err := d.Remove(t.Context(), api.RemoveRequest{Image: id}); status(err) != http.StatusConflict {
		t.Errorf("removing a mounted image: %v", err)
	}
	if err := d.Remove(t.Context(), api.RemoveRequest{Image: "nobody"}); status(err) != http.StatusNotFound {
		t.Errorf("removing an unknown image: %v", err)
	}
	other := zstd
	other.DomainID = "other"
	o := d.mount(t, other)
	n := d.mount(t, none)
	compareBig(t, o)
	compareBig(t, n)
	d.umount(t, m)
	d.remove(t, api.RemoveRequest{Image: zstd.Bootstrap})
	compareBig(t, o)
	compareBig(t, n)
	d.umount(t, n)
	d.umount(t, o)
	d.remove(t, api.RemoveRequest{Image: none.Bootstrap})
	d.remove(t, api.RemoveRequest{Image: zstd.Bootstrap, DomainID: "other"})
	if left := cachedFiles(t, d.root); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	m = d.mount(t, zstd)
	compareBig(t, m)
}

// TestRemoveSettles: who removes an image that was unmounted this moment waits for the kernel
// to let go of it.
func TestRemoveSettles(t *testing.T) {
	needFanotify(t)
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "zstd")
	m := d.mount(t, r)
	f, err := os.Open(m) // as a file that is being closed
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Unmount(m, syscall.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, func() { f.Close() })
	if err := d.Remove(t.Context(), api.RemoveRequest{Image: r.Bootstrap}); err != nil {
		t.Error(err)
	}
}

// TestCacheLimit: above the high mark the least recently used image goes, if it is
// neither mounted nor pinned.
func TestCacheLimit(t *testing.T) {
	pinned := localRequest(t, "zstd")
	pinned.Pinned = true
	use := func(d *testDaemon, r api.MountRequest) int64 {
		m := d.mount(t, r)
		compareBig(t, m)
		d.umount(t, m)
		await(t, "the end of the image's use", func() bool {
			st, err := d.Status(t.Context())
			return err == nil && !slices.ContainsFunc(st.Kept, func(k api.Kept) bool { return k.Source == r.Bootstrap && k.InUse })
		})
		time.Sleep(10 * time.Millisecond) // times of files are that exact
		st, err := d.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.CacheBytes
	}
	d := startDaemon(t, daemonOptions{})
	size := use(d, pinned)
	if size < 1<<20 {
		t.Fatalf("the cache of a complete image takes %d bytes", size)
	}
	d.stop(t)

	d = startDaemon(t, daemonOptions{root: d.root, high: size * 5 / 2, low: size * 9 / 4})
	oldest, newer := localRequest(t, "lz4"), localRequest(t, "none")
	use(d, oldest)
	mounted := d.mount(t, newer)
	compareBig(t, mounted)
	newest := localRequest(t, "sha256-64k")
	use(d, newest) // its end is when the cache is looked at
	await(t, "eviction", func() bool {
		st, err := d.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		kept := map[string]bool{}
		for _, k := range st.Kept {
			kept[k.Source] = true
		}
		if !kept[pinned.Bootstrap] || !kept[newer.Bootstrap] {
			t.Fatalf("a pinned or mounted image is gone: %+v", st.Kept)
		}
		return !kept[oldest.Bootstrap] && st.CacheBytes <= size*9/4
	})
	compareBig(t, mounted)
	if _, err := os.Stat(filepath.Join(d.root, "images")); err != nil {
		t.Error(err)
	}
}
