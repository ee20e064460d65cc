package nydus_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/api/nydus/nydustest"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestConformance(t *testing.T) {
	nydustest.Run(t, func(t *testing.T, s nydustest.Setup) nydustest.Target {
		m := newModel(s)
		vars, err := m.writeImages(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		socket, srv, _ := serve(t, nydus.Handler(m))
		m.exit = func() {
			go func() { _ = srv.Shutdown(context.Background()) }() // the test waits for its end
		}
		return nydustest.Target{Socket: socket, Model: true, Vars: vars}
	})
}

// serve serves h at a socket until the test ends. What it logs is returned too.
func serve(t *testing.T, h http.Handler) (socket string, srv *http.Server, logged *testenv.Buffer) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	logged = new(testenv.Buffer)
	srv = nydus.Server(h, slog.New(slog.NewTextHandler(logged, nil)))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.Serve(l) // always ends with an error: that it was closed
	}()
	t.Cleanup(func() {
		srv.Close()
		<-ended
	})
	return socket, srv, logged
}

func dial(t *testing.T, socket string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestTooManyConnections(t *testing.T) {
	socket, _, _ := serve(t, nydus.Handler(newModel(nydustest.Setup{State: "RUNNING"})))
	held := make([]net.Conn, nydus.MaxConnections)
	for i := range held {
		held[i] = dial(t, socket)
	}
	c := dial(t, socket)
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 503 \r\n") ||
		!strings.HasSuffix(string(answer), "\r\n\r\n"+`{ "error": "Too many open connections" }`) {
		t.Errorf("connection %d: %q, %v", nydus.MaxConnections+1, answer, err)
	}
	// The others are as they were, and when one goes there is room for another.
	held[0].Close()
	for deadline := time.Now().Add(20 * time.Second); ; {
		c := dial(t, socket)
		fmt.Fprint(c, "GET /api/v1/daemon HTTP/1.1\r\nHost: nydus\r\n\r\n")
		got := make([]byte, len("HTTP/1.1 200"))
		if err := c.SetReadDeadline(deadline); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, got); err == nil && string(got) == "HTTP/1.1 200" {
			break
		}
		c.Close()
		if time.Now().After(deadline) {
			t.Fatalf("no connection after another was closed: %q", got)
		}
	}
	fmt.Fprint(held[1], "GET /api/v1/daemon HTTP/1.1\r\nHost: nydus\r\n\r\n")
	got := make([]byte, len("HTTP/1.1 200"))
	if _, err := io.ReadFull(held[1], got); err != nil || string(got) != "HTTP/1.1 200" {
		t.Errorf("a connection that was silent: %q, %v", got, err)
	}
}

// TestShutdown: a silent connection does not hold it up, as it does in net/http for 5 s.
func TestShutdown(t *testing.T) {
	socket, srv, _ := serve(t, nydus.Handler(newModel(nydustest.Setup{State: "RUNNING"})))
	silent, other := dial(t, socket), dial(t, socket)
	fmt.Fprint(other, "GET /api/v1/daemon HTTP/1.1\r\nHost: nydus\r\n\r\n")
	if _, err := io.ReadFull(other, make([]byte, 1)); err != nil { // so both are accepted
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if n, err := silent.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("the silent connection: %d bytes, %v", n, err)
	}
}

// TestNoWaitForEachOther: a call that waits holds up no other.
func TestNoWaitForEachOther(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	slow := slowService{newModel(nydustest.Setup{State: "RUNNING"}), entered, release}
	socket, _, _ := serve(t, nydus.Handler(slow))
	a, b := dial(t, socket), dial(t, socket)
	fmt.Fprint(a, "PUT /api/v2/blobs HTTP/1.1\r\nHost: nydus\r\nContent-Length: 2\r\n\r\n{}")
	<-entered
	fmt.Fprint(b, "GET /api/v1/daemon HTTP/1.1\r\nHost: nydus\r\n\r\n")
	got := make([]byte, len("HTTP/1.1 200"))
	if err := b.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b, got); err != nil || string(got) != "HTTP/1.1 200" {
		t.Errorf("GET /daemon while a PUT waits: %q, %v", got, err)
	}
	close(release)
	if _, err := io.ReadFull(a, got); err != nil || string(got) != "HTTP/1.1 204" {
		t.Errorf("the PUT: %q, %v", got, err)
	}
}

type slowService struct {
	*model
	entered, release chan struct{}
}

func (s slowService) PutBlob(ctx context.Context, _ []byte) error {
	close(s.entered)
	select {
	case <-s.release:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestLeft: a call whose client has left learns of it.
func TestLeft(t *testing.T) {
	entered := make(chan struct{})
	ended := make(chan error, 1)
	socket, _, _ := serve(t, nydus.Handler(watched{
		slowService{newModel(nydustest.Setup{State: "RUNNING"}), entered, nil}, ended,
	}))
	c := dial(t, socket)
	fmt.Fprint(c, "PUT /api/v2/blobs HTTP/1.1\r\nHost: nydus\r\nContent-Length: 2\r\n\r\n{}")
	<-entered
	c.Close()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the call ended without an error")
		}
	case <-time.After(20 * time.Second):
		t.Error("the call goes on")
	}
}

type watched struct {
	slowService
	ended chan error
}

func (w watched) PutBlob(ctx context.Context, entry []byte) error {
	err := w.slowService.PutBlob(ctx, entry)
	w.ended <- err
	return err
}

func TestRoute(t *testing.T) {
	say := func(what string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, what) })
	}
	h := nydus.Route(nydus.Handler(newModel(nydustest.Setup{State: "RUNNING"})), map[string]http.Handler{
		"/metrics": say("prometheus"), "/api/erofsd/v1/": say("own"), "/api/erofsd/v1/cache/": say("cache"),
	})
	const noRoute = `{"code":"UNDEFINED","message":"NoRoute"}`
	for target, want := range map[string]string{
		"/metrics":                 "prometheus",
		"/metrics?a=b":             "prometheus",
		"/metrics/":                noRoute,
		"/metricsx":                noRoute,
		"/api/erofsd/v1/status":    "own",
		"/api/erofsd/v1/":          "own",
		"/api/erofsd/v1":           noRoute,
		"/api/erofsd/v1/cache/use": "cache",
		"//metrics":                noRoute,
		"/":                        noRoute,
		"/api/v1/daemon/events":    `{"max_errors":500,"total_errors":0,"max_size":51200,"total_size":0,"errors":[]}`,
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, target, nil))
		if got := w.Body.String(); got != want {
			t.Errorf("%s: %s, want %s", target, got, want)
		}
	}
}

// FuzzHandler: whatever comes, the answer is one of the API's, and nothing of the body.
func FuzzHandler(f *testing.F) {
	const secret = "sesame-open-7731"
	m := newModel(nydustest.Setup{State: "RUNNING", Mounts: true})
	dir, err := os.MkdirTemp("", "nydus-fuzz-*")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { os.RemoveAll(dir) })
	if _, err := m.writeImages(dir); err != nil {
		f.Fatal(err)
	}
	h := nydus.Handler(m)
	f.Add("GET", "/api/v1/daemon", "", "")
	f.Add("PUT", "/api/v1/daemon", "", `{"log_level":"`+secret+`"}`)
	f.Add("POST", "/api/v1/mount", "mountpoint=/m", `{"source":"`+secret+`","fs_type":"`+secret+`","config":"x"}`)
	f.Add("PUT", "/api/v1/config", "id=%2F", `{"`+secret+`":"x"}`)
	f.Add("PUT", "/api/v2/blobs", "", `{"type":"bootstrap","id":"`+secret+`","config":{}}`)
	f.Add("DELETE", "/api/v2/blobs", "domain_id=&blob_id=%zz", "")
	f.Add("GET", "/api/v1/metrics/files", "latest=true&id=/empty;x", "")
	f.Fuzz(func(t *testing.T, method, path, query, body string) {
		r := httptest.NewRequest(http.MethodGet, "/", strings.NewReader(body))
		r.Method = method
		r.URL.Path, r.URL.RawPath, r.URL.RawQuery = path, "", query
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		switch w.Code {
		case 200, 204, 400, 404, 500, 501, 503:
		default:
			t.Errorf("status %d: %s", w.Code, w.Body)
		}
		answer := w.Body.String()
		if (w.Code == 204) != (answer == "") {
			t.Errorf("status %d with body %q", w.Code, answer)
		}
		if w.Code >= 400 && (!strings.HasPrefix(answer, `{"code":"UNDEFINED","message":"`) || strings.Contains(answer, secret)) {
			t.Errorf("%s %s?%s: %s", method, path, query, answer)
		}
	})
}
