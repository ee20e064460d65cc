package backend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/httpproxy"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A forward is a forward proxy that asks for a password, before an origin.
type forward struct {
	t      *testing.T
	faults *backendtest.HTTPFaults
	url    string // of the proxy, with the password
	ping   string
	dead   atomic.Bool // connections are broken off, pings too
	pings  atomic.Int64
	direct atomic.Int64 // requests to the origin that did not come through the proxy
	addr   string       // of the origin
	ref    backend.Ref
	data   []byte
	log    testenv.Buffer

	mu   sync.Mutex // guards seen
	seen []http.Header
}

const proxyPassword = "hunter2"

func newForward(t *testing.T) *forward {
	f := &forward{t: t, data: backendtest.Bytes(100_000, 1)}
	f.ref = backend.Ref{Digest: digest.FromBytes(f.data), Size: int64(len(f.data))}
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Via") == "" {
			f.direct.Add(1)
			if r.Header.Get("X-Dragonfly-Priority") != "" || r.Header.Get("Proxy-Authorization") != "" {
				t.Error("a request that went directly has the proxy's headers")
			}
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.data))
	}))
	transport := &http.Transport{}
	f.faults = backendtest.NewHTTPFaults(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.seen = append(f.seen, r.Header.Clone())
		f.mu.Unlock()
		out := r.Clone(r.Context())
		out.RequestURI = ""
		out.Header.Del("Proxy-Authorization")
		out.Header.Set("Via", "test")
		resp, err := transport.RoundTrip(out)
		if err != nil {
			http.Error(w, "no", http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	}))
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f.dead.Load() {
			panic(http.ErrAbortHandler)
		}
		if r.URL.Path == "/healthy" {
			f.pings.Add(1)
			return
		}
		if r.Header.Get("Proxy-Authorization") == "" {
			http.Error(w, "who?", http.StatusProxyAuthRequired)
			return
		}
		f.faults.ServeHTTP(w, r)
	}))
	f.addr, f.ping = origin.URL, proxy.URL+"/healthy"
	u, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("anna", proxyPassword)
	f.url = u.String()
	t.Cleanup(func() {
		proxy.Close()
		transport.CloseIdleConnections()
		origin.Close()
		if strings.Contains(f.log.String(), proxyPassword) {
			t.Errorf("the password is in the log:\n%s", f.log.String())
		}
	})
	return f
}

// open returns the blob read through the proxy, with retries.
func (f *forward) open(o backend.ProxyOptions) backend.Blob {
	f.t.Helper()
	o.URL = f.url
	s, err := httpproxy.New(httpproxy.Options{
		Addr: f.addr, Stall: 200 * time.Millisecond,
		HTTP: backend.HTTPOptions{Proxy: o, Logger: slog.New(slog.NewTextHandler(&f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { s.Close() })
	b, err := backend.Retry(s, backend.RetryPolicy{Attempts: 4, Wait: time.Millisecond, BreakAfter: 1000}).Open(f.t.Context(), f.ref)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

// read reads a part of b, and returns how many requests went directly and to the proxy.
func (f *forward) read(ctx context.Context, b backend.Blob) (direct int64, proxy int, err error) {
	f.t.Helper()
	direct0 := f.direct.Load()
	proxy0, _ := f.faults.Requests()
	p := make([]byte, 5000)
	err = b.ReadAt(ctx, p, 1000)
	if err == nil && !bytes.Equal(p, f.data[1000:6000]) {
		f.t.Error("wrong bytes")
	}
	if err != nil && strings.Contains(err.Error(), proxyPassword) {
		f.t.Errorf("the password is in %v", err)
	}
	proxy1, _ := f.faults.Requests()
	return f.direct.Load() - direct0, proxy1 - proxy0, err
}

// wait polls until ok says so.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after 10 s", what)
		}
	}
}

// TestProxyFaults is nydus's error injection against a controllable proxy.
func TestProxyFaults(t *testing.T) {
	typed := func(code int) backendtest.Action {
		return backendtest.Status(code, "X-Dragonfly-Error-Type", "proxy")
	}
	fallback, nydusStrict, strict := backend.ProxyOptions{Fallback: true}, backend.ProxyOptions{LastTryDirect: true}, backend.ProxyOptions{}
	for _, c := range []struct {
		name   string
		fault  backendtest.Action
		ok     []backend.ProxyOptions
		is     error // of the others
		direct bool  // with fallback: no second request to the proxy
	}{
		{name: "429", fault: typed(429), ok: []backend.ProxyOptions{fallback, nydusStrict}, direct: true},
		{name: "403", fault: typed(403), is: fs.ErrPermission},
		{name: "500", fault: backendtest.Status(500), ok: []backend.ProxyOptions{fallback, nydusStrict}, direct: true},
		{name: "stall", fault: backendtest.Stall(-1), ok: []backend.ProxyOptions{fallback, nydusStrict}},
		{name: "stall in the body", fault: backendtest.Stall(10), ok: []backend.ProxyOptions{fallback, nydusStrict}},
		{name: "reset in the body", fault: backendtest.Reset(10), ok: []backend.ProxyOptions{fallback, nydusStrict}},
		{name: "short", fault: backendtest.Short(10), is: io.ErrUnexpectedEOF},
		{name: "403 of the origin", fault: backendtest.Status(403), is: fs.ErrPermission},
		{name: "407", fault: backendtest.Status(407), is: fs.ErrPermission},
	} {
		for name, o := range map[string]backend.ProxyOptions{"fallback": fallback, "nydus strict": nydusStrict, "strict": strict} {
			for _, timeout := range []time.Duration{time.Second, time.Hour} {
				t.Run(c.name+"/"+name+"/"+timeout.String(), func(t *testing.T) {
					t.Parallel()
					f := newForward(t)
					want := false
					for _, ok := range c.ok {
						want = want || ok == o
					}
					o := o
					o.Timeout = timeout
					b := f.open(o)
					f.faults.Add(backendtest.All, -1, c.fault)
					direct, proxy, err := f.read(t.Context(), b)
					if (err == nil) != want || err != nil && c.is != nil && !errors.Is(err, c.is) {
						t.Errorf("error %v, want success %v, else %v", err, want, c.is)
					}
					if want && c.direct && o.Fallback && (direct != 1 || proxy != 1) {
						t.Errorf("%d requests directly and %d to the proxy, want 1 and 1", direct, proxy)
					}
					if !want && direct != 0 {
						t.Errorf("%d requests around the proxy", direct)
					}
					f.faults.Clear()
					if direct, proxy, err := f.read(t.Context(), b); err != nil || direct != 0 || proxy != 1 {
						t.Errorf("after the fault: %d requests directly, %d to the proxy, error %v", direct, proxy, err)
					}
				})
			}
		}
	}
}

// TestProxyHeaders: the proxy learns the priority, and a limit that it gives to a
// prefetch is final.
func TestProxyHeaders(t *testing.T) {
	f := newForward(t)
	b := f.open(backend.ProxyOptions{Fallback: true})
	prefetch := backend.WithPriority(t.Context(), backend.Prefetch)
	for _, ctx := range []context.Context{t.Context(), prefetch} {
		if _, _, err := f.read(ctx, b); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []string{"6", "3"} {
		h := f.seen[i]
		if h.Get("X-Dragonfly-Use-P2P") != "true" || h.Get("X-Dragonfly-Prefetch") != "true" || h.Get("X-Dragonfly-Priority") != want {
			t.Errorf("request %d has header %v", i, h)
		}
	}
	f.faults.Add(backendtest.All, -1, backendtest.Status(429, "X-Dragonfly-Error-Type", "proxy"))
	if direct, proxy, err := f.read(prefetch, b); err == nil || direct != 0 || proxy != 1 {
		t.Errorf("limited prefetch: %d requests directly, %d to the proxy, error %v", direct, proxy, err)
	}
	if direct, proxy, err := f.read(backend.FromOrigin(t.Context()), b); err != nil || direct != 1 || proxy != 0 {
		t.Errorf("read from the origin: %d requests directly, %d to the proxy, error %v", direct, proxy, err)
	}
	if direct, proxy, err := f.read(backend.Private(t.Context()), b); err != nil || direct != 1 || proxy != 0 {
		t.Errorf("request with a password: %d requests directly, %d to the proxy, error %v", direct, proxy, err)
	}
}

// TestProxyHealth: KillDfdaemon_HealthCheckDetection, ReadWithProxyDown, FallbackLogging,
// ProxyUnhealthy_NoFallback, RestartAndRecover.
func TestProxyHealth(t *testing.T) {
	for name, o := range map[string]backend.ProxyOptions{
		"fallback":     {Fallback: true},
		"strict":       {},
		"nydus strict": {LastTryDirect: true},
	} {
		for _, ping := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, ping %v", name, ping), func(t *testing.T) {
				f := newForward(t)
				o := o
				o.CheckInterval = 20 * time.Millisecond
				if ping {
					o.PingURL = f.ping
				}
				b := f.open(o)
				if direct, proxy, err := f.read(t.Context(), b); err != nil || direct != 0 || proxy != 1 {
					t.Fatalf("%d requests directly, %d to the proxy, error %v", direct, proxy, err)
				}
				f.dead.Store(true)
				for !strings.Contains(f.log.String(), "Detected proxy unhealthy") {
					if direct, _, err := f.read(t.Context(), b); (err == nil) != o.Fallback || !o.Fallback && (direct != 0 || !backend.Temporary(err)) {
						t.Fatalf("read with the proxy down: %d requests directly, error %v", direct, err)
					}
				}
				if strings.Contains(f.log.String(), "fallback") != o.Fallback {
					t.Errorf("log:\n%s", f.log.String())
				}
				f.dead.Store(false)
				wait(t, "recovery", func() bool {
					f.read(t.Context(), b)
					return strings.Contains(f.log.String(), "Backend proxy recovered")
				})
				if _, proxy, err := f.read(t.Context(), b); err != nil || proxy != 1 {
					t.Errorf("after it is back: %d requests to the proxy, error %v", proxy, err)
				}
			})
		}
	}
}

// TestProxyIdle: pings end some time after the last read and begin with the next.
func TestProxyIdle(t *testing.T) {
	f := newForward(t)
	b := f.open(backend.ProxyOptions{PingURL: f.ping, CheckInterval: 5 * time.Millisecond, CheckPause: 50 * time.Millisecond})
	if f.pings.Load() != 0 {
		t.Error("pings before the first read")
	}
	for range 2 {
		before := f.pings.Load()
		if _, _, err := f.read(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		wait(t, "pings", func() bool { return f.pings.Load() > before+1 })
		wait(t, "silence", func() bool {
			n := f.pings.Load()
			time.Sleep(100 * time.Millisecond)
			return f.pings.Load() == n
		})
	}
}

func TestProxyOptions(t *testing.T) {
	for _, u := range []string{"proxy:3128", "socks5://u:hunter2@h", "http://", "http://u:hunter2@h:x/%zz"} {
		_, err := backend.NewHTTPClient(backend.HTTPOptions{Proxy: backend.ProxyOptions{URL: u}})
		if err == nil || strings.Contains(err.Error(), proxyPassword) {
			t.Errorf("%q: error %v", u, err)
		}
	}
}
