package scenario

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/erofsd/erofsd/backend/backendtest"
)

func faults() []Scenario {
	return []Scenario{
		{"backend-down-and-back", backendDown},
		{"wrong-bytes", wrongBytes},
		{"cache-full", cacheFull},
	}
}

// always, as a number of times, lets a fault last until it is cleared.
const always = -1

// backendDown cuts every connection to the backend: what is missing is EIO, what is
// there can be read, and all can be read soon after the backend is back.
func backendDown(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request("standard"))
	check(t, fs, want, "big/text")
	s.Add(backendtest.All, always, backendtest.Reset(0))
	if p, err := readFile(fs, "big/random", len(want.data["big/random"])); !isFailure(err) || len(p) > 0 {
		t.Errorf("without a backend: %d bytes, %v", len(p), err)
	}
	check(t, fs, want, "big/text")
	if i := m.image(t, point); i.Blobs[0].LastError == "" {
		t.Errorf("no last error: %+v", i)
	}
	s.Clear()
	await(t, "reads to succeed again", func() bool {
		_, err := readFile(fs, "big/random", len(want.data["big/random"]))
		return err == nil
	})
	compare(t, want.list, fs)
}

// check reads one file, which must be right.
func check(t testing.TB, fs fileSystem, want *tree, name string) {
	t.Helper()
	if p, err := readFile(fs, name, len(want.data[name])); err != nil || !bytes.Equal(p, want.data[name]) {
		t.Errorf("%s: %d bytes of %d, or wrong ones: %v", name, len(p), len(want.data[name]), err)
	}
}

// wrongBytes garbles every byte that the backend sends: none reaches a reader, and the
// next read succeeds when the backend is right again.
func wrongBytes(t *testing.T, r Row) {
	want := r.images.standard(t)
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request("standard"))
	s.Add(backendtest.BlobReads, always, garble)
	failed := 0
	for _, name := range want.chosen() {
		p, err := readFile(fs, name, len(want.data[name]))
		if len(p) > 0 && !zeros(want.data[name]) {
			t.Fatalf("%s: %d bytes of a garbled blob reached the reader", name, len(p))
		}
		if isFailure(err) {
			failed++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if i := m.image(t, point); failed == 0 || i.CorruptChunks == 0 || i.Blobs[0].LastError == "" {
		t.Errorf("%d reads failed, status %+v", failed, i)
	}
	s.Clear()
	compare(t, want.list, fs)
}

// zeros says that a file may need no data.
func zeros(p []byte) bool { return bytes.Count(p, []byte{0}) == len(p) }

// garble answers with other bytes.
func garble(w http.ResponseWriter, r *http.Request, next http.Handler) {
	next.ServeHTTP(garbler{w}, r)
}

type garbler struct{ http.ResponseWriter }

func (g garbler) Write(p []byte) (int, error) {
	q := bytes.Clone(p)
	for i := range q {
		q[i] ^= 0x55
	}
	return g.ResponseWriter.Write(q)
}

// cacheFull leaves no room in the cache: reads that need it fail, and succeed as soon
// as there is room.
func cacheFull(t *testing.T, r Row) {
	want := r.images.standard(t)
	m := r.start(t, config{small: true})
	_, fs := m.mount(t, r.images.serve(t).request("standard"))
	check(t, fs, want, "sizes/4096")
	m.driver.fill(t)
	failed := 0
	for _, name := range want.chosen() {
		p, err := readFile(fs, name, len(want.data[name]))
		if !bytes.HasPrefix(want.data[name], p) {
			t.Errorf("%s: wrong bytes", name)
		}
		if isFailure(err) {
			failed++
		} else if err != nil {
			t.Error(err)
		}
	}
	if failed == 0 {
		t.Error("no read failed without room in the cache")
	}
	m.driver.empty(t)
	compare(t, want.list, fs)
}
