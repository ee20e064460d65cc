package scenario

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

func mounting() []Scenario {
	return []Scenario{
		{"mount", mountScenario},
		{"whole-tree", wholeTree},
		{"fixtures", fixtures},
		{"remount-warm", remountWarm},
		{"second-mount-same-image", secondMount},
		{"two-hundred-images", manyImages},
	}
}

// mountScenario mounts and unmounts, and fetches no data for that.
func mountScenario(t *testing.T, r Row) {
	r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, _ := m.mount(t, s.request("standard"))
	i := m.image(t, point)
	if i.Transport != r.Transport || i.Complete || i.Source != reference(s.host, "standard") {
		t.Errorf("%+v", i)
	}
	m.umountAll(t, point)
	if _, err := m.Mount(t.Context(), api.MountRequest{Reference: reference(s.host, "none"), PlainHTTP: true, Mountpoint: m.point(t)}); err == nil {
		t.Error("mounted what does not exist")
	}
}

// wholeTree reads everything once: every path and attribute, every byte. Each chunk
// is fetched once, and then nothing is missing.
func wholeTree(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request("standard"))
	compare(t, want.list, fs)
	m.awaitComplete(t, point)
	i := m.image(t, point)
	checkFetchedOnce(t, r, s, i)
	if i.BytesPresent != i.BytesTotal || i.KernelEvents == 0 || i.CorruptChunks != 0 {
		t.Errorf("after everything was read: %+v", i)
	}
	t.Logf("%d bytes of files, %d events", want.size(), i.KernelEvents)
}

// checkFetchedOnce checks, by both counts, that no part of an image's blob was
// fetched twice.
func checkFetchedOnce(t testing.TB, r Row, s *server, i api.Mount) {
	t.Helper()
	stored, served := r.images.blobSize(t, i), s.blob(t, i)
	if i.BytesFetched > stored || served.Bytes > stored {
		t.Errorf("of a blob of %d bytes the daemon fetched %d, and the registry sent %d: something was fetched twice", stored, i.BytesFetched, served.Bytes)
	}
	if i.BytesFetched == 0 || served.Bytes < i.BytesFetched {
		t.Errorf("the daemon says that it fetched %d bytes, the registry sent %d", i.BytesFetched, served.Bytes)
	}
	t.Logf("%d bytes of a blob of %d, %d requests", i.BytesFetched, stored, i.BackendRequests)
}

// fixtures reads every image of nydus's own tools.
func fixtures(t *testing.T, r Row) {
	testenv.Fixtures(t)
	m := r.start(t, config{})
	for _, name := range []string{"zstd", "lz4", "none", "sha256-64k", "batch", "layered"} {
		t.Run(name, func(t *testing.T) {
			req, want := fixture(t, name)
			point, fs := m.mount(t, req)
			compare(t, want, fs)
			m.awaitComplete(t, point)
			if i := m.image(t, point); i.KernelEvents == 0 {
				t.Errorf("the kernel asked for nothing: %+v", i)
			}
			m.umountAll(t, point)
		})
	}
}

// remountWarm mounts a complete image again, and once more by another daemon: the
// backend is asked for no blob.
func remountWarm(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request("standard"))
	compare(t, want.list, fs)
	m.umountAll(t, point)
	for _, again := range []string{"same daemon", "next daemon"} {
		before := s.blobReads()
		point, fs := m.mount(t, s.request("standard"))
		compare(t, want.list, fs)
		m.awaitComplete(t, point) // with cachefiles it is looked at beside the reads, which need nobody
		if i := m.image(t, point); i.BackendRequests != 0 {
			t.Errorf("%s: a warm mount asked the backend: %+v", again, i)
		}
		if n := s.blobReads() - before; n != 0 {
			t.Errorf("%s: %d requests for blobs", again, n)
		}
		m.umountAll(t, point)
		m.driver.stop(t)
		m.begin(t)
	}
}

// secondMount mounts an image twice at a time. The second costs nothing, and outlives
// the first.
func secondMount(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	first, fs := m.mount(t, s.request("standard"))
	compare(t, want.list, fs)
	before := s.blob(t, m.image(t, first))
	second, fs := m.mount(t, s.request("standard"))
	compare(t, want.list, fs)
	if after := s.blob(t, m.image(t, second)); after != before {
		t.Errorf("the second mount fetched: %+v, before %+v", after, before)
	}
	m.umount(t, first)
	compare(t, want.list, fs)
	m.umountAll(t, second)
}

// manyImages has 200 images mounted at once.
func manyImages(t *testing.T, r Row) {
	const images, makers = 200, 4
	m := r.start(t, config{})
	dir := scratch(t)
	points := make([]string, images)
	requests := make([]api.MountRequest, images)
	for i := range images {
		points[i] = m.point(t)
	}
	each := func(what string, do func(i int) error) {
		t.Helper()
		defer func(start time.Time) { t.Logf("%s: %v", what, time.Since(start)) }(time.Now())
		var wg sync.WaitGroup
		for w := range makers {
			wg.Go(func() {
				for i := w; i < images; i += makers {
					if err := do(i); err != nil {
						t.Errorf("%s image %d: %v", what, i, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	each("make", func(i int) error {
		var err error
		requests[i], err = directory(t.Context(), tinyTree(i), filepath.Join(dir, tinyName(i)))
		requests[i].Mountpoint = points[i]
		return err
	})
	each("mount", func(i int) error {
		_, err := m.Mount(t.Context(), requests[i])
		return err
	})
	if n := len(m.images(t)); n != images {
		t.Errorf("%d images are mounted, want %d", n, images)
	}
	each("read", func(i int) error {
		want := tinyTree(i).data["number"]
		p, err := readFile(m.driver.view(points[i]), "number", len(want))
		if err == nil && string(p) != string(want) {
			t.Errorf("image %d: %q", i, p)
		}
		return err
	})
	each("unmount", func(i int) error {
		return m.Unmount(t.Context(), api.UnmountRequest{Mountpoint: points[i]})
	})
	m.awaitClosed(t)
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
}
