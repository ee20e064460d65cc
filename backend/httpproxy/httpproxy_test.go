package httpproxy_test

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/httpproxy"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// files is a plain HTTP server of blobs below prefix.
func files(prefix string, blobs ...[]byte) (http.Handler, []backend.Ref) {
	var refs []backend.Ref
	have := map[string][]byte{}
	for _, p := range blobs {
		d := digest.FromBytes(p)
		have[prefix+"/"+d.Encoded()] = p
		refs = append(refs, backend.Ref{Digest: d, Size: int64(len(p))})
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, ok := have[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(p))
	}), refs
}

func newStore(t *testing.T, o httpproxy.Options) *httpproxy.Store {
	t.Helper()
	s, err := httpproxy.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestConformance(t *testing.T) {
	t.Run("tcp", func(t *testing.T) {
		backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
			h, refs := files("/deep/er", blobs...)
			server := httptest.NewServer(h)
			t.Cleanup(server.Close)
			return newStore(t, httpproxy.Options{Addr: server.URL + "/deep/", Path: "/er"}), refs
		})
	})
	t.Run("unix", func(t *testing.T) {
		backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
			h, refs := files("", blobs...)
			server := httptest.NewUnstartedServer(h)
			server.Listener.Close()
			socket := filepath.Join(t.TempDir(), "s")
			var err error
			if server.Listener, err = net.Listen("unix", socket); err != nil {
				t.Fatal(err)
			}
			server.Start()
			t.Cleanup(server.Close)
			return newStore(t, httpproxy.Options{Addr: socket}), refs
		})
	})
}

func TestOptions(t *testing.T) {
	for _, addr := range []string{"", "host", "host:80", "ftp://host", "http://", "relative/path", "http://u:hunter2@host", "http://host:hunter2", "http://host/?hunter2", "http://h%zzhunter2"} {
		_, err := httpproxy.New(httpproxy.Options{Addr: addr})
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: error %v", addr, err)
		}
	}
}

func TestFaults(t *testing.T) {
	backendtest.Faults(t, func(t *testing.T, stall time.Duration, blobs ...[]byte) backendtest.Faulty {
		h, refs := files("", blobs...)
		faults := backendtest.NewHTTPFaults(h)
		server := httptest.NewServer(faults)
		t.Cleanup(server.Close)
		return backendtest.Faulty{Store: newStore(t, httpproxy.Options{Addr: server.URL, Stall: stall}), Refs: refs, Faults: faults}
	})
}

// Servers behind one address may have ETags of their own: the digests of chunks tell whether
// the bytes are right.
func TestChangingETags(t *testing.T) {
	data := backendtest.Bytes(10_000, 3)
	n := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n++
		w.Header().Set("Etag", fmt.Sprintf("%q", fmt.Sprint(n)))
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer srv.Close()
	s, err := httpproxy.New(httpproxy.Options{Addr: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b, err := s.Open(t.Context(), backend.Ref{Digest: digest.FromBytes(data), Size: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for off := int64(0); off < 3000; off += 1000 {
		p := make([]byte, 1000)
		if err := b.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, data[off:off+1000]) {
			t.Errorf("at %d: %v", off, err)
		}
	}
}
