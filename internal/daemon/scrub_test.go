package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// rotten changes a byte in every page of the one cache file that the daemon has.
func (d *testDaemon) rotten(t *testing.T, r api.MountRequest) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(d.root, "cache", filepath.Base(onlyBlob(t, r))), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1)
	for off := int64(0); off < st.Size(); off += 4096 {
		if _, err := f.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		p[0] ^= 0x20
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
}

// TestScrub: what rots in the cache of a complete image, which nobody asks the daemon for
// any more, is an error and not wrong bytes after a scrub without its backend, and right
// again after one with it.
func TestScrub(t *testing.T) {
	d := startDaemon(t, daemonOptions{completion: true})
	if fanotify.Supported(d.root) != nil {
		if _, err := d.Scrub(t.Context(), api.ScrubRequest{}); status(err) != http.StatusConflict || !strings.Contains(err.Error(), "cachefiles") {
			t.Errorf("scrub with cachefiles: %v", err)
		}
		return
	}
	r := localRequest(t, "zstd")
	blob := onlyBlob(t, r)
	m := d.mount(t, r)
	files, tree := regularFiles(t, m), fixtureList(t)
	if _, err := readAll(files[0]); err != nil {
		t.Fatal(err)
	}
	await(t, "the image to be complete", func() bool { return d.image(t, m).Complete })
	if s, err := d.Scrub(t.Context(), api.ScrubRequest{}); err != nil || s.Wrong != 0 || s.Bytes == 0 {
		t.Fatalf("scrub of a good cache: %+v, %v", s, err)
	}
	d.rotten(t, r)
	good, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blob, make([]byte, len(good)), 0o600); err != nil { // the same file: it may be open
		t.Fatal(err)
	}
	s, err := d.Scrub(t.Context(), api.ScrubRequest{Images: []string{r.Bootstrap}})
	if err != nil || s.Wrong == 0 || s.Unrepaired != s.Wrong {
		t.Fatalf("scrub without a backend: %+v, %v", s, err)
	}
	denied := 0
	for _, f := range files[1:] {
		p, err := readAll(f)
		sum := sha256.Sum256(p)
		switch want := tree[strings.TrimPrefix(f, m+"/")].SHA256; {
		case isEIO(err):
			denied++
		case err != nil:
			t.Errorf("%s: %v", f, err)
		case hex.EncodeToString(sum[:]) != want:
			t.Errorf("%s: wrong bytes", f)
		}
	}
	if denied == 0 {
		t.Error("no read failed")
	}
	if err := os.WriteFile(blob, good, 0o600); err != nil {
		t.Fatal(err)
	}
	compareTree(t, tree, m)
	// What the kernel has of the first file is not read again, and completion waits longer
	// after each failure.
	if err := d.Prefetch(t.Context(), api.PrefetchRequest{Image: d.image(t, m).ID, Files: []string{"/"}}); err != nil {
		t.Fatal(err)
	}
	await(t, "the image to be complete again", func() bool { return d.image(t, m).Complete })
	d.rotten(t, r)
	if s, err := d.Scrub(t.Context(), api.ScrubRequest{Images: []string{d.image(t, m).ID}}); err != nil || s.Wrong == 0 || s.Repaired != s.Wrong {
		t.Fatalf("scrub: %+v, %v", s, err)
	}
	await(t, "the image to be complete once more", func() bool { return d.image(t, m).Complete })
	events := d.image(t, m).KernelEvents
	second := newMountpoint(t) // with a page cache of its own
	d.umount(t, m)
	r.Mountpoint = second
	if _, err := d.Mount(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	compareTree(t, tree, second)
	if n := d.image(t, second).KernelEvents; n > events && n > 100 {
		t.Errorf("%d events of a complete image", n)
	}
	if _, err := d.Scrub(t.Context(), api.ScrubRequest{Images: []string{"none"}}); status(err) != http.StatusNotFound {
		t.Errorf("scrub of an image that is not kept: %v", err)
	}
}

// TestScrubKept: images that are not mounted are scrubbed too.
func TestScrubKept(t *testing.T) {
	d := startDaemon(t, daemonOptions{completion: true})
	if err := fanotify.Supported(d.root); err != nil {
		testenv.Kernel(t, "fanotify", err)
	}
	r := localRequest(t, "lz4")
	m := d.mount(t, r)
	if _, err := readAll(regularFiles(t, m)[0]); err != nil {
		t.Fatal(err)
	}
	await(t, "the image to be complete", func() bool { return d.image(t, m).Complete })
	d.umount(t, m)
	await(t, "the image to be closed", func() bool {
		st, err := d.Status(t.Context())
		return err == nil && len(st.Kept) == 1 && !st.Kept[0].InUse
	})
	d.rotten(t, r)
	if s, err := d.Scrub(t.Context(), api.ScrubRequest{}); err != nil || s.Wrong == 0 || s.Repaired != s.Wrong {
		t.Fatalf("scrub: %+v, %v", s, err)
	}
	compareTree(t, fixtureList(t), d.mount(t, r))
}

// TestScrubAdopted: mounts of a predecessor are made to ask again too.
func TestScrubAdopted(t *testing.T) {
	d := startDaemon(t, daemonOptions{completion: true})
	if err := fanotify.Supported(d.root); err != nil {
		testenv.Kernel(t, "fanotify", err)
	}
	r := localRequest(t, "none")
	m := d.mount(t, r)
	files := regularFiles(t, m)
	if _, err := readAll(files[0]); err != nil {
		t.Fatal(err)
	}
	await(t, "the image to be complete", func() bool { return d.image(t, m).Complete })
	d.kill()
	d.unguarded(t)
	d = startDaemon(t, daemonOptions{root: d.root, completion: true})
	if !d.image(t, m).Complete {
		t.Fatal("not adopted")
	}
	d.rotten(t, r)
	if s, err := d.Scrub(t.Context(), api.ScrubRequest{}); err != nil || s.Wrong == 0 || s.Repaired != s.Wrong {
		t.Fatalf("scrub: %+v, %v", s, err)
	}
	d.rotten(t, r)
	blob := onlyBlob(t, r)
	st, err := os.Stat(blob)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blob, make([]byte, st.Size()), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := d.Scrub(t.Context(), api.ScrubRequest{}); err != nil || s.Unrepaired == 0 { // a chunk of zeros can be repaired
		t.Fatalf("scrub without a backend: %+v, %v", s, err)
	}
	if rightOrDenied(t, m, files[1:]) == 0 {
		t.Error("no read failed")
	}
}
