package e2e

import (
	"cmp"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofsd/erofsd/kernel-tests/services"
)

// A dfdaemon stands in for Dragonfly's: a forward proxy for http that is told by header
// fields what to do, says with others what went wrong, and has a health check at /healthy. It
// can be killed, and started again at its address.
type dfdaemon struct {
	addr      string
	transport http.Transport
	scheme    string // that it asks with; "": as it is asked

	server *http.Server // of the test's goroutine
	done   chan struct{}

	mu       sync.Mutex // guards what follows
	fault    http.HandlerFunc
	requests map[string]int // for blobs, by what they tell Dragonfly
}

func newDfdaemon(t *testing.T) *dfdaemon {
	t.Helper()
	d := &dfdaemon{addr: services.FreeAddr(t), requests: map[string]int{}}
	d.start(t)
	t.Cleanup(func() {
		d.kill()
		d.transport.CloseIdleConnections()
	})
	return d
}

func (d *dfdaemon) start(t *testing.T) {
	t.Helper()
	var l net.Listener
	var err error
	// What another test starts has the old listener until it is another program.
	for end := time.Now().Add(bound); l == nil; time.Sleep(time.Millisecond) {
		if l, err = net.Listen("tcp", d.addr); err != nil && time.Now().After(end) {
			t.Fatal(err)
		}
	}
	d.server, d.done = &http.Server{Handler: d}, make(chan struct{})
	go func(s *http.Server, done chan struct{}) {
		defer close(done)
		_ = s.Serve(l) // ends with ErrServerClosed
	}(d.server, d.done)
}

// kill breaks all connections.
func (d *dfdaemon) kill() {
	d.server.Close()
	<-d.done
}

// fail makes it answer requests for blobs so; nil: properly.
func (d *dfdaemon) fail(fault http.HandlerFunc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = fault
}

// served is how many requests for blobs there were.
func (d *dfdaemon) served() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, m := range d.requests {
		n += m
	}
	return n
}

// told is what the requests said, and how many said so.
func (d *dfdaemon) told() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.requests)
}

func (d *dfdaemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Host == "" {
		return // 200: it is healthy
	}
	var fault http.HandlerFunc
	if strings.Contains(r.URL.Path, "/blobs/") {
		d.mu.Lock()
		d.requests["p2p "+r.Header.Get("X-Dragonfly-Use-P2P")+" prefetch "+r.Header.Get("X-Dragonfly-Prefetch")+" priority "+r.Header.Get("X-Dragonfly-Priority")]++
		fault = d.fault
		d.mu.Unlock()
	}
	if fault != nil {
		fault(w, r)
		return
	}
	out := r.Clone(r.Context())
	out.RequestURI = ""
	out.URL.Scheme = cmp.Or(d.scheme, out.URL.Scheme)
	resp, err := d.transport.RoundTrip(out)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body) // the reader may leave
}

// refuse is an answer of the proxy itself.
func refuse(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Dragonfly-Error-Type", "proxy")
		http.Error(w, "no", code)
	}
}

// stall is none for so long.
func stall(d time.Duration) http.HandlerFunc {
	return func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(d):
		}
		panic(http.ErrAbortHandler)
	}
}
