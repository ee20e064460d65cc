package registry_test

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	fakeregistry "github.com/google/go-containerregistry/pkg/registry"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/registry"
)

// A mirror is a server before another registry's content.
type mirror struct {
	*backendtest.HTTPFaults
	url, host string
	pings     atomic.Int64
	bad       atomic.Value // what is wrong with the last bad request
}

// newMirror serves next below prefix and checks each request.
func newMirror(t *testing.T, next http.Handler, prefix string, check func(r *http.Request) string) *mirror {
	m := &mirror{HTTPFaults: backendtest.NewHTTPFaults(next)}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ping" {
			m.pings.Add(1)
			return
		}
		if bad := check(r); bad != "" && !strings.HasSuffix(r.URL.Path, "/v2/") {
			m.bad.Store(bad)
		}
		r.URL.Path = strings.TrimPrefix(r.URL.Path, prefix)
		m.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	m.url, m.host = server.URL, strings.TrimPrefix(server.URL, "http://")
	return m
}

func (m *mirror) check(t *testing.T) {
	t.Helper()
	if bad := m.bad.Load(); bad != nil {
		t.Error(bad)
	}
}

func blobReads(f *backendtest.HTTPFaults) int {
	_, n := f.Requests()
	return n
}

// TestNydusMirrors: the first mirror that is well is read, with its headers; the login is
// got from the registry or through the mirror.
func TestNydusMirrors(t *testing.T) {
	for _, through := range []bool{false, true} {
		t.Run(fmt.Sprint("auth_through ", through), func(t *testing.T) {
			tokens := &tokenService{}
			w := newWorld(t, tokens.guard, registry.Options{Credential: login})
			data := backendtest.Bytes(100_000, 1)
			ref := w.push(data)[0]
			own := tokens.issued.Load()
			var mirrorTokens tokenService
			var behind http.Handler = w.faults // the mirror trusts whoever comes
			if through {
				behind = mirrorTokens.guard(w.faults)
			}
			m := newMirror(t, behind, "", func(r *http.Request) string {
				if r.URL.Path != "/token" && r.Header.Get("X-Dragonfly-Registry") != w.host {
					return "header is missing in " + r.URL.Path
				}
				return ""
			})
			s, err := registry.New(registry.Options{
				PlainHTTP: true, Credential: login, Stall: 200 * time.Millisecond,
				Mirrors: []registry.MirrorHost{{
					Host: m.url, Header: http.Header{"x-dragonfly-registry": {w.host}}, PingURL: m.url + "/ping",
					AuthThrough: through, CheckInterval: 5 * time.Millisecond, FailureLimit: 1,
				}},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			b, err := s.Open(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			if err := readAll(t, b, data, 8); err != nil {
				t.Fatal(err)
			}
			if through && (mirrorTokens.issued.Load() != 1 || tokens.issued.Load() != own) {
				t.Errorf("%d tokens by way of the mirror, %d of the registry", mirrorTokens.issued.Load(), tokens.issued.Load()-own)
			}
			if n := blobReads(m.HTTPFaults); n < 8 {
				t.Errorf("%d reads at the mirror", n)
			}
			m.check(t)

			// The mirror goes: reads go on at the registry, and come back.
			m.Add(backendtest.All, -1, backendtest.Status(503))
			if err := readAll(t, b, data, 8); err != nil {
				t.Errorf("mirror answers 503: %v", err)
			}
			m.Clear()
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
				before := blobReads(m.HTTPFaults)
				if err := readAll(t, b, data, 1); err != nil {
					t.Fatal(err)
				}
				if blobReads(m.HTTPFaults) > before {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("the mirror is not used again")
				}
			}
			if m.pings.Load() == 0 {
				t.Error("no pings")
			}
			if _, err := s.Manifest(t.Context(), w.host+"/"+repo+":missing"); err == nil {
				t.Error("a manifest that nobody has was found")
			}
			w.secrets(nil)
		})
	}
	for _, host := range []string{"", "ftp://h", "http://u:hunter2@h", "http://"} {
		_, err := registry.New(registry.Options{Mirrors: []registry.MirrorHost{{Host: host}}})
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("mirror %q: error %v", host, err)
		}
	}
}

// TestMirrorLogin: without auth_through, a mirror that wants a login gets what the registry
// granted.
func TestMirrorLogin(t *testing.T) {
	tokens := &tokenService{}
	w := newWorld(t, tokens.guard, registry.Options{Credential: login})
	data := backendtest.Bytes(100_000, 1)
	ref := w.push(data)[0]
	m := newMirror(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+tokens.token() {
			rw.Header().Set("WWW-Authenticate", `Bearer realm="http://192.0.2.1/nobody"`)
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.faults.ServeHTTP(rw, r)
	}), "", func(*http.Request) string { return "" })
	s, err := registry.New(registry.Options{PlainHTTP: true, Credential: login, Mirrors: []registry.MirrorHost{{Host: m.url}}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b, err := s.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		tokens.epoch.Add(1)
		before, asked, issued := blobReads(m.HTTPFaults), tokens.refused.Load(), tokens.issued.Load()
		if err := readAll(t, b, data, 16); err != nil {
			t.Fatal(err)
		}
		if blobReads(m.HTTPFaults) < before+16 {
			t.Error("the mirror was not read")
		}
		if asked, issued = tokens.refused.Load()-asked, tokens.issued.Load()-issued; asked != 1 || issued != 1 {
			t.Errorf("the registry was asked %d times what login it wants, and %d times for a token", asked, issued)
		}
	}
}

func writeHosts(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestHostsDir: containerd's directories: which one counts, the order of hosts, paths,
// headers, capabilities, certificates; several registries of one store; changes.
func TestHostsDir(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	data := backendtest.Bytes(100_000, 1)
	ref := w.push(data)[0]
	none := func(*http.Request) string { return "" }
	second := newMirror(t, w.faults, "", none)
	first := newMirror(t, w.faults, "/deep/api", func(r *http.Request) string {
		if r.Header.Get("X-Site") != "a" || r.URL.Query().Get("ns") != w.host || !strings.HasPrefix(r.URL.Path, "/deep/api/v2/") {
			return fmt.Sprintf("%v with header %v", r.URL, r.Header)
		}
		return ""
	})
	pusher := newMirror(t, w.faults, "", none)
	tlsServer := httptest.NewUnstartedServer(w.faults)
	tlsServer.Config.ErrorLog = log.New(io.Discard, "", 0)
	tlsServer.StartTLS()
	defer tlsServer.Close()
	tlsHost := strings.TrimPrefix(tlsServer.URL, "https://")

	dir := t.TempDir()
	writeHosts(t, dir, "_default", "server = \"http://127.0.0.1:1\"\n")
	port := strings.Replace(w.host, ":", "_", 1) + "_"
	writeHosts(t, dir, port, fmt.Sprintf(`
server = "http://%s"

[host."http://%s"]
  capabilities = ["push"]
[host."http://%s/deep/api"]
  capabilities = ["pull", "resolve"]
  [host."http://%s/deep/api".header]
    x-site = "a"
[host."http://%s/v2"]
  skip_verify = true
`, w.host, pusher.host, first.host, first.host, second.host))
	writeHosts(t, dir, tlsHost, `ca = "ca.pem"`)
	if err := os.WriteFile(filepath.Join(dir, tlsHost, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tlsServer.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}

	s, err := registry.New(registry.Options{HostsDir: dir, Stall: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	read := func(host string) error {
		r := ref
		r.Host = host
		b, err := s.Open(t.Context(), r)
		if err != nil {
			return err
		}
		defer b.Close()
		p := make([]byte, 10)
		if err := b.ReadAt(t.Context(), p, 5); err != nil {
			return err
		}
		if !bytes.Equal(p, data[5:15]) {
			t.Error("wrong bytes")
		}
		return nil
	}
	counts := func() [3]int {
		return [3]int{blobReads(first.HTTPFaults), blobReads(second.HTTPFaults), blobReads(pusher.HTTPFaults)}
	}
	for i, want := range [][3]int{{1, 0, 0}, {2, 1, 0}} {
		if i == 1 {
			first.Add(backendtest.BlobReads, -1, backendtest.Status(404))
		}
		if err := read(w.host); err != nil {
			t.Error(err)
		}
		if got := counts(); got != want {
			t.Errorf("reads at the mirrors %v, want %v", got, want)
		}
	}
	first.check(t)
	if err := read(tlsHost); err != nil {
		t.Errorf("registry with a CA of its own: %v", err)
	}
	if err := read("elsewhere.example"); !backend.Temporary(err) || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("a registry that _default sends elsewhere: %v", err)
	}

	// host:port counts when host_port_ is gone, and a change at once.
	if err := os.Rename(filepath.Join(dir, port), filepath.Join(dir, w.host)); err != nil {
		t.Fatal(err)
	}
	writeHosts(t, dir, w.host, fmt.Sprintf("server = \"http://%s\"\n", w.host))
	before := counts()
	if err := read(w.host); err != nil || counts() != before {
		t.Errorf("after the mirrors are gone: error %v, reads there %v", err, counts())
	}

	for text, want := range map[string]string{
		"server = \"http://h\"\nservr = 1\n":        "line 2: unknown key servr",
		"[host.\"http://h\"]\n  capabilites = []\n": "line 2: unknown key host.http://h.capabilites",
		"server = 7":                                                     "line 1",
		"server = \"http://u:hunter2@h\"":                                "not of the form",
		"[host.\"http://h\"]\ncapabilities = [\"steal\"]":                "steal",
		"[host.\"http://h\"]\nclient = [[\"a\",\"b\"],[\"c\",\"d\"]]":    "more than one client certificate",
		"[host.\"http://h\"]\nclient = [\"a\",\"b\",\"c\"]":              "client",
		"[host.\"http://h\"]\ndial_timeout = \"soon\"":                   "dial_timeout",
		"[host.\"http://h\"]\n[host.\"http://h\".header]\nx = [hunter2]": "line 3",
		"[host.\"http://h\"]\n[host.\"http://h\".header]\nx = [1]":       "header x",
		"ca = \"missing.pem\"":                                           "missing.pem",
		strings.Repeat("#", 1<<20+1):                                     "larger than",
	} {
		writeHosts(t, dir, "_default", text)
		if err := read("elsewhere.example"); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%.60q: error %.300v, want %q", text, err, want)
		}
	}
}

// TestScheme: http is used only for a registry that does not speak TLS, and only when
// nothing else was asked for and certificates do not matter.
func TestScheme(t *testing.T) {
	plain := fakeregistry.New(fakeregistry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(plain)
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	up := newWorld(t, nil, registry.Options{})
	up.host = host
	data := backendtest.Bytes(1000, 1)
	ref := up.push(data)[0]
	for _, c := range []struct {
		o  registry.Options
		ok bool
	}{
		{registry.Options{Scheme: "http"}, true},
		{registry.Options{HTTP: backend.HTTPOptions{SkipVerify: true}}, true},
		{registry.Options{}, false},
		{registry.Options{Scheme: "https", HTTP: backend.HTTPOptions{SkipVerify: true}}, false},
	} {
		s, err := registry.New(c.o)
		if err != nil {
			t.Fatal(err)
		}
		b, err := s.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			p := make([]byte, 1000)
			if err := b.ReadAt(t.Context(), p, 0); (err == nil) != c.ok || c.ok && !bytes.Equal(p, data) {
				t.Errorf("scheme %q, skip verify %v: error %v", c.o.Scheme, c.o.HTTP.SkipVerify, err)
			}
		}
		s.Close()
	}
	// A server that only redirects to https speaks TLS, if not just now.
	redirector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://"+r.Host+r.URL.Path, http.StatusMovedPermanently)
	}))
	defer redirector.Close()
	s, err := registry.New(registry.Options{HTTP: backend.HTTPOptions{SkipVerify: true}, Credential: login})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ref.Host = strings.TrimPrefix(redirector.URL, "http://")
	b, err := s.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.ReadAt(t.Context(), make([]byte, 1), 0); err == nil || strings.Contains(err.Error(), "redirected") {
		t.Errorf("a server that redirects to https: error %v", err)
	}

	for _, o := range []registry.Options{{Scheme: "ftp"}, {BlobURLScheme: "ftp"}} {
		if _, err := registry.New(o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

// TestRedirectRewritten: blob_url_scheme and blob_redirected_host, a relative Location, a
// chain, and an address that is known to have expired.
func TestRedirectRewritten(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	data := backendtest.Bytes(100_000, 1)
	ref := w.push(data)[0]
	storageHost := strings.TrimPrefix(w.storageURL, "http://")
	open := func(o registry.Options) func() error {
		o.PlainHTTP = true
		s, err := registry.New(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		b, err := s.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		return func() error { return readAll(t, b, data, 1) }
	}

	w.faults.Add(backendtest.BlobReads, -1, w.storage.Redirect("https://nowhere.invalid"))
	if err := open(registry.Options{BlobURLScheme: "http", BlobRedirectedHost: storageHost})(); err != nil {
		t.Errorf("rewritten: %v", err)
	}
	if err := open(registry.Options{})(); err == nil {
		t.Error("not rewritten: no error")
	}

	// registry → relative → relative → storage
	w.faults.Clear()
	chain := func(to string) backendtest.Action { return backendtest.Status(http.StatusFound, "Location", to) }
	w.faults.Add(backendtest.Path("/blobs/"), 1, chain("../moved/one"))
	w.faults.Add(backendtest.Path("/moved/one"), 1, chain("two?x=y"))
	w.faults.Add(backendtest.Path("/moved/two"), 1, func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
		r.URL.Path = "/v2/" + repo + "/blobs/" + ref.Digest.String()
		w.storage.Redirect(w.storageURL)(rw, r, next)
	})
	read := open(registry.Options{})
	before, _ := w.faults.Requests()
	for range 3 {
		if err := read(); err != nil {
			t.Fatal(err)
		}
	}
	if after, _ := w.faults.Requests(); after-before != 3 {
		t.Errorf("%d requests to the registry for a chain of three redirects and three reads", after-before)
	}

	// The redirect says that it is good for a second.
	w.faults.Clear()
	w.faults.Add(backendtest.BlobReads, -1, func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
		rw.Header().Set("Cache-Control", "max-age=1")
		w.storage.Redirect(w.storageURL)(rw, r, next)
	})
	read = open(registry.Options{})
	for range 2 {
		if err := read(); err != nil {
			t.Fatal(err)
		}
		w.storage.Expire(http.StatusTeapot) // which would not be taken for an expired address
		time.Sleep(time.Second)
	}
}

// TestMirroredConformance: a registry behind a mirror that fails now and then is, with
// retries, a store like any other. Without them, a mirror that is down for a moment makes
// an error of the registry temporary: the mirror may be the one that has the blob.
func TestMirroredConformance(t *testing.T) {
	backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
		w := newWorld(t, basicAuth, registry.Options{Credential: login})
		refs := w.push(blobs...)
		m := newMirror(t, w.faults, "", func(*http.Request) string { return "" })
		for i := range 5 {
			m.Add(backendtest.BlobReads, i, func(w http.ResponseWriter, r *http.Request, next http.Handler) { next.ServeHTTP(w, r) })
			m.Add(backendtest.BlobReads, 1, backendtest.Status(500+i%4))
		}
		s, err := registry.New(registry.Options{PlainHTTP: true, Credential: login, Mirrors: []registry.MirrorHost{{Host: m.url}}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return backend.Retry(s, backend.RetryPolicy{Wait: time.Millisecond}), refs
	})
}
