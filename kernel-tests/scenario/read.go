package scenario

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"

	"github.com/erofsd/erofsd/backend/backendtest"
)

func reading() []Scenario {
	return []Scenario{
		{"random-reads", randomReads},
		{"mmap-cold", mmapCold},
		{"execve-cold", execveCold},
		{"parallel-readers", parallelReaders},
		{"same-chunk-many-readers", sameChunk},
	}
}

// randomReads reads ranges of any size anywhere.
func randomReads(t *testing.T, r Row) {
	const reads, longest = 300, 3 * chunkSize / 2
	want := r.images.standard(t)
	m := r.start(t, config{})
	_, fs := m.mount(t, r.images.serve(t).request("standard"))
	rnd := rand.New(rand.NewPCG(seed, 1))
	names := want.files()
	for range reads {
		name := names[rnd.IntN(len(names))]
		data := want.data[name]
		if len(data) == 0 {
			continue
		}
		off := rnd.IntN(len(data))
		p := make([]byte, 1+rnd.IntN(min(longest, len(data)-off)))
		if err := readAt(fs, name, p, int64(off)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, data[off:off+len(p)]) {
			t.Fatalf("%s: wrong bytes in [%d, +%d), seed %d", name, off, len(p), seed)
		}
	}
}

// readAt reads a range that lies in a file.
func readAt(fs fileSystem, name string, p []byte, off int64) error {
	f, err := fs.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.ReadAt(p, off); err != nil {
		return fmt.Errorf("read %s, [%d, +%d): %w", name, off, len(p), err)
	}
	return nil
}

// mmapCold reads by page faults.
func mmapCold(t *testing.T, r Row) {
	want := r.images.standard(t)
	m := r.start(t, config{})
	_, fs := m.mount(t, r.images.serve(t).request("standard"))
	for _, name := range []string{"big/text", "big/random", "sizes/4097"} {
		p, err := fs.mapped(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want.data[name]) {
			t.Errorf("%s: wrong bytes by page faults", name)
		}
	}
}

// execveCold executes a program of which nothing is there.
func execveCold(t *testing.T, r Row) {
	r.images.standard(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, r.images.serve(t).request("standard"))
	if err := fs.run("bin/true"); err != nil {
		t.Fatal(err)
	}
	if i := m.image(t, point); i.BytesFetched == 0 {
		t.Errorf("nothing was fetched: %+v", i)
	}
}

// parallelReaders has 64 readers of the tree, each of which begins elsewhere. Each
// chunk is fetched once.
func parallelReaders(t *testing.T, r Row) {
	const readers = 64
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request("standard"))
	names := want.files()
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			for k := range names {
				name := names[(k+i*len(names)/readers)%len(names)]
				p, err := readFile(fs, name, len(want.data[name]))
				if err != nil || !bytes.Equal(p, want.data[name]) {
					t.Errorf("reader %d: %s: %d bytes of %d, or wrong ones: %v", i, name, len(p), len(want.data[name]), err)
					return
				}
			}
		})
	}
	wg.Wait()
	checkFetchedOnce(t, r, s, m.image(t, point))
}

// sameChunk has 64 readers of the same page, all of whom have asked before the backend
// answers: it is asked once.
func sameChunk(t *testing.T, r Row) {
	const readers = 64
	want := r.images.get(t, "one", func() *tree {
		tr := newTree(seed)
		tr.file("one", tr.random(100_000), 0o644, nil)
		return tr
	})
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request("one"))
	before := s.blobReads()
	h := newHold()
	s.Add(backendtest.BlobReads, 1, h.action)
	var started, done sync.WaitGroup
	for range readers {
		started.Add(1)
		done.Go(func() {
			p := make([]byte, 4096)
			started.Done()
			if err := readAt(fs, "one", p, 8192); err != nil || !bytes.Equal(p, want.data["one"][8192:][:4096]) {
				t.Errorf("wrong bytes, or %v", err)
			}
		})
	}
	started.Wait()
	h.await(t)
	h.release()
	done.Wait()
	if n := s.blobReads() - before; n != 1 {
		t.Errorf("%d requests for one chunk", n)
	}
	if i := m.image(t, point); i.BackendRequests != 1 {
		t.Errorf("%+v", i)
	}
}

// A hold keeps requests back until it is released, or for ever.
type hold struct {
	reached, released chan struct{}
	first, once       sync.Once
}

func newHold() *hold {
	return &hold{reached: make(chan struct{}), released: make(chan struct{})}
}

func (h *hold) action(w http.ResponseWriter, r *http.Request, next http.Handler) {
	h.first.Do(func() { close(h.reached) })
	select {
	case <-h.released:
		next.ServeHTTP(w, r)
	case <-r.Context().Done():
		panic(http.ErrAbortHandler)
	}
}

// await waits until a request is held.
func (h *hold) await(t testing.TB) {
	t.Helper()
	await(t, "a request to the backend", func() bool {
		select {
		case <-h.reached:
			return true
		default:
			return false
		}
	})
}

func (h *hold) release() { h.once.Do(func() { close(h.released) }) }
