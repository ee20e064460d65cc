package e2e

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// A front is a server before docker-registry that can be made to answer wrongly.
type front struct {
	*backendtest.HTTPFaults
	addr string
	next http.Handler // the registry
}

func newFront(t *testing.T, origin *services.Process) *front {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	next := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: origin.Addr}) },
		// A reader that leaves is nothing to say.
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	f := &front{HTTPFaults: backendtest.NewHTTPFaults(next), next: next}
	f.addr = serve(t, f)
	return f
}

// serve serves h until the end of t and returns its host:port.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(func() {
		server.CloseClientConnections() // a request that is held back ends
		server.Close()
	})
	return strings.TrimPrefix(server.URL, "http://")
}

// always, as a number of times, lets a fault last until it is cleared.
const always = -1

// stallInBody lets a mirror be opened, by its first byte, and then sends ten bytes and nothing.
func stallInBody(w http.ResponseWriter, r *http.Request, next http.Handler) {
	if r.Header.Get("Range") == "bytes=0-0" {
		next.ServeHTTP(w, r)
		return
	}
	backendtest.Stall(10)(w, r, next)
}

// faults has servers that answer wrongly, all the time.
func (w *world) faults(t *testing.T) {
	origin := w.seeded(t, services.RegistryOptions{})
	for name, row := range map[string]struct {
		action backendtest.Action
		either bool // the right bytes can be made of it
	}{
		"down":           {backendtest.Reset(0), false},
		"503":            {backendtest.Status(http.StatusServiceUnavailable, "Retry-After", "1"), false},
		"ignores-range":  {backendtest.Whole, true},
		"truncated":      {backendtest.Short(10), false},
		"reset-in-body":  {backendtest.Reset(10), false},
		"wrong-range":    {backendtest.WrongRange("bytes 0-99/100"), true},
		"wrong-bytes":    {backendtest.WrongBytes, false},
		"slow-loris":     {backendtest.Drip(10, 100*time.Millisecond), false},
		"stall-in-body":  {stallInBody, false},
		"stall-no-head":  {backendtest.Stall(-1), false},
		"404-of-storage": {backendtest.Status(http.StatusNotFound), false},
	} {
		t.Run(name+"/mirror", func(t *testing.T) {
			t.Parallel()
			w.faultyMirror(t, origin, row.action)
		})
		t.Run(name+"/alone", func(t *testing.T) {
			t.Parallel()
			w.faultyAlone(t, origin, row.action, row.either)
		})
	}
	t.Run("signed-redirect-expires", func(t *testing.T) { w.redirectExpires(t, origin) })
}

// faultyMirror: the origin is right, so every read succeeds, and none takes long.
func (w *world) faultyMirror(t *testing.T, origin *services.Process, fault backendtest.Action) {
	f, m := newFront(t, origin), w.start(t)
	point := m.mount(t, "registry", at(origin.Addr, "http", object{"timeout": 1, "retry_limit": 2, "mirrors": []object{
		{"host": "http://" + f.addr, "health_check_interval": 1, "failure_limit": 2},
	}}))
	f.Add(backendtest.BlobReads, always, fault)
	m.mustRead(t, point, w.files("data/")[:3]...)
	w.load(t, point).wait(t, bound)
	m.whole(t, point)
	if _, blobs := f.Requests(); blobs == 0 {
		t.Error("the mirror was not asked")
	}
}

// faultyAlone: no source is right, so reads fail in time; nothing wrong is kept, and all is
// well when the fault is gone.
func (w *world) faultyAlone(t *testing.T, origin *services.Process, fault backendtest.Action, either bool) {
	f, m := newFront(t, origin), w.start(t)
	keys := at(f.addr, "http", object{"timeout": 1, "retry_limit": 2})
	point := m.mount(t, "registry", keys)
	names := w.files("data/")
	m.mustRead(t, point, names[0])
	f.Add(backendtest.BlobReads, always, fault)
	for _, name := range []string{names[20], "usr/bin/program-00"} {
		if took, err := w.read(point, name); err == nil && either && took < bound {
			continue
		}
		m.mustFail(t, point, name)
	}
	m.again(t)
	point = m.mount(t, "registry", keys)
	m.mustRead(t, point, names[0])
	f.Clear()
	m.recovers(t, point, names[20])
	m.recovers(t, point, "usr/bin/program-00")
	m.whole(t, point)
}

// redirectExpires has a registry that sends readers of blobs to a storage, whose addresses
// are signed and end under load.
func (w *world) redirectExpires(t *testing.T, origin *services.Process) {
	f, m := newFront(t, origin), w.start(t)
	storage := backendtest.NewStorage(f.next)
	f.Add(backendtest.BlobReads, always, storage.Redirect("http://"+serve(t, storage)))
	point := m.mount(t, "registry", at(f.addr, "http", object{"auth": services.Auth()}))
	l := w.load(t, point)
	for _, code := range []int{http.StatusForbidden, http.StatusUnauthorized, http.StatusNotFound} {
		l.await(t, 12)
		storage.Expire(code)
	}
	l.wait(t, bound)
	m.whole(t, point)
	if n := storage.Leaked(); n > 0 {
		t.Errorf("%d requests to the storage had the registry's login", n)
	}
}
