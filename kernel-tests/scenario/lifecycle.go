package scenario

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/api"
)

func lifecycle() []Scenario {
	return []Scenario{
		{"unmount-while-reading", unmountWhileReading},
		{"kill-while-reading", killWhileReading},
		{"kill-during-open", killDuringOpen},
		{"restart-with-mounts", restartWithMounts},
	}
}

// unmountWhileReading: an image in use is not unmounted; when it is detached, whoever
// is in it reads on, and with the last of them the image is closed.
func unmountWhileReading(t *testing.T, r Row) {
	want := r.images.standard(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, r.images.serve(t).request("standard"))
	const name, half = "big/random", chunkSize
	f, err := fs.open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, len(want.data[name]))
	if _, err := f.ReadAt(p[:half], 0); err != nil {
		t.Fatal(err)
	}
	err = m.Unmount(t.Context(), api.UnmountRequest{Mountpoint: point})
	if e := (*api.Error)(nil); !errors.As(err, &e) || e.Status != http.StatusConflict || !strings.Contains(e.Message, "busy") {
		t.Errorf("unmounted while a file was open: %v", err)
	}
	if err := m.driver.abandon(point); err != nil {
		t.Fatal(err)
	}
	if i := m.image(t, ""); !i.Detached {
		t.Errorf("not detached: %+v", i)
	}
	if _, err := f.ReadAt(p[half:], half); err != nil || !bytes.Equal(p, want.data[name]) {
		t.Errorf("after it was detached: wrong bytes, or %v", err)
	}
	f.Close()
	m.awaitClosed(t)
}

// after matches requests for blobs but for the first n.
func after(n int64) func(*http.Request) bool {
	var seen atomic.Int64
	return func(r *http.Request) bool { return backendtest.BlobReads(r) && seen.Add(1) > n }
}

// killWhileReading kills the daemon while it waits for the backend, and readers for
// it: they get the right bytes or an error, and all come to an end.
func killWhileReading(t *testing.T, r Row) {
	const readers = 8
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request("standard"))
	h := newHold()
	s.Add(after(4), always, h.action)
	names := want.files()
	var failed atomic.Int64
	ended := make(chan struct{})
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			for k := range names {
				name := names[(k+i*len(names)/readers)%len(names)]
				p, err := readFile(fs, name, len(want.data[name]))
				if !bytes.HasPrefix(want.data[name], p) {
					t.Errorf("%s: wrong bytes, zeros perhaps", name)
				}
				if err != nil {
					failed.Add(1)
				} else if len(p) < len(want.data[name]) {
					t.Errorf("%s: only %d bytes and no error", name, len(p))
				}
			}
		})
	}
	go func() {
		defer close(ended)
		wg.Wait()
	}()
	h.await(t)
	m.driver.kill(t)
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("readers hang")
	}
	if failed.Load() == 0 {
		t.Error("no read failed, although the daemon never got the data")
	}
	m.goOn(t, s, want, point)
}

// goOn starts a daemon after one that was killed, and mounts the image anew.
func (m *machine) goOn(t testing.TB, s *server, want *tree, point string) {
	t.Helper()
	_ = m.driver.abandon(point) // there may be no mount
	s.Clear()
	m.begin(t)
	_, fs := m.mount(t, s.request("standard"))
	compare(t, want.list, fs)
}

// killDuringOpen kills the daemon in the middle of a mount: nobody waits for ever, and
// the next daemon mounts the image.
func killDuringOpen(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	q := s.request("standard")
	q.Mountpoint = m.point(t)
	mount := func() error { _, err := m.Mount(t.Context(), q); return err }
	m.driver.killMounting(t, mount, func() { m.umountAll(t, q.Mountpoint) })
	m.goOn(t, s, want, q.Mountpoint)
}

// restartWithMounts ends the daemon, in order and by force, while images are mounted.
// With cachefiles somebody else holds the device: reads that are under way wait for
// the next daemon. With fanotify images that are complete go on without any.
func restartWithMounts(t *testing.T, r Row) {
	if r.Transport == cachefilesTransport {
		restartHeld(t, r)
	} else {
		restartComplete(t, r)
	}
}

func restartHeld(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{held: true})
	point, fs := m.mount(t, s.request("standard"))
	for _, c := range []struct {
		name string
		end  func(testing.TB)
	}{{"big/random", m.driver.stop}, {"big/text", m.driver.kill}} {
		name := c.name
		h := newHold()
		s.Add(backendtest.BlobReads, always, h.action)
		type result struct {
			p   []byte
			err error
		}
		got := make(chan result, 1)
		go func() {
			p, err := readFile(fs, name, len(want.data[name]))
			got <- result{p, err}
		}()
		h.await(t)
		c.end(t)
		s.Clear()
		m.begin(t)
		select {
		case res := <-got:
			if res.err != nil || !bytes.Equal(res.p, want.data[name]) {
				t.Errorf("%s, whose reader waited: %d bytes, or wrong ones: %v", name, len(res.p), res.err)
			}
		case <-time.After(patience):
			t.Fatalf("the reader of %s hangs\n%s", name, m.driver.log())
		}
	}
	compare(t, want.list, fs)
	m.umountAll(t, point)
}

func restartComplete(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{completion: true})
	point, fs := m.mount(t, s.request("standard"))
	compare(t, want.list, fs)
	m.awaitComplete(t, point)
	m.driver.kill(t)
	compare(t, want.list, fs)
	m.begin(t)
	if i := m.image(t, point); !i.Complete {
		t.Errorf("not taken over: %+v", i)
	}
	compare(t, want.list, fs)
	m.umountAll(t, point)
}
