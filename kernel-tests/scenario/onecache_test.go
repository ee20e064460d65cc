package scenario

import (
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
)

// TestOneCache takes a root from one transport to the other and back: what one has fetched
// the other does not fetch, nor does it keep it twice.
func TestOneCache(t *testing.T) {
	images := NewImages(t)
	want := images.standard(t)
	s := images.serve(t)
	rows := map[string]Row{}
	for _, r := range Rows(images) {
		rows[r.Name] = r
	}
	root, fetched := "", 0
	for round, name := range []string{"fake-fanotify", "fake-cachefiles", "fake-fanotify", "fake-cachefiles"} {
		m := rows[name].start(t, config{root: root})
		root = m.root
		if st, err := m.Status(t.Context()); err != nil || (len(st.Kept) == 1) != (round > 0) || (st.CacheBytes > 0) != (round > 0) {
			t.Errorf("round %d: %d images of %d bytes are kept (%v)", round, len(st.Kept), st.CacheBytes, err)
		}
		before := s.blobReads()
		point, fs := m.mount(t, s.request("standard"))
		compare(t, want.list, fs)
		m.awaitComplete(t, point)
		if n := s.blobReads() - before; (n > 0) != (round == 0) {
			t.Errorf("round %d, %s: %d requests", round, name, n)
		}
		fetched += s.blobReads() - before
		id := m.image(t, point).Blobs[0].ID
		m.umountAll(t, point)
		if round == 3 {
			removed(t, m, s)
		}
		m.end(t)
		theirs := filepath.Join(root, "cache", id)
		if name == "fake-cachefiles" {
			k := m.driver.(*inProcess).kernel.(*fakeCachefiles).k
			if err := k.Export(filepath.Join(root, "fscache")); err != nil {
				t.Fatal(err)
			}
		} else {
			theirs = filepath.Join(root, "fscache", "cache", "*", "*", "D"+id)
		}
		if left, err := filepath.Glob(theirs); err != nil || len(left) > 0 {
			t.Errorf("round %d, %s: still there: %q (%v)", round, name, left, err)
		}
	}
	if fetched == 0 {
		t.Error("nothing was ever fetched")
	}
}

// removed has the image removed, and looks that nothing of it is kept by either transport.
func removed(t *testing.T, m *machine, s *server) {
	t.Helper()
	await(t, "the image to be removed", func() bool {
		return m.Remove(t.Context(), api.RemoveRequest{Image: s.request("standard").Reference}) == nil
	})
	files, err := filepath.Glob(filepath.Join(m.root, "cache", "[^,]*"))
	if err != nil || len(files) > 0 {
		t.Errorf("left in the cache: %q (%v)", files, err)
	}
}
