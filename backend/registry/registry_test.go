package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	fakeregistry "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const repo = "library/demo"

// A world is a registry with faults before it, a storage host, and a log of
// everything that the store says.
type world struct {
	t       *testing.T
	faults  *backendtest.HTTPFaults
	host    string
	storage *backendtest.Storage
	store   *registry.Store
	log     *bytes.Buffer
	conns   atomic.Int64 // connections to the registry so far

	storageFaults *backendtest.HTTPFaults
	storageURL    string
}

// newWorld starts the servers. guard, when not nil, stands before everything.
func newWorld(t *testing.T, guard func(http.Handler) http.Handler, o registry.Options) *world {
	t.Helper()
	real := fakeregistry.New(fakeregistry.Logger(log.New(io.Discard, "", 0)))
	w := &world{t: t, faults: backendtest.NewHTTPFaults(real), storage: backendtest.NewStorage(real), log: new(bytes.Buffer)}
	w.storageFaults = backendtest.NewHTTPFaults(w.storage)
	var front http.Handler = w.faults
	if guard != nil {
		front = guard(front)
	}
	server, storage := httptest.NewUnstartedServer(front), httptest.NewServer(w.storageFaults)
	server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			w.conns.Add(1)
		}
	}
	server.Start()
	w.host, w.storageURL = strings.TrimPrefix(server.URL, "http://"), storage.URL

	o.PlainHTTP = true
	o.Logger = slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if o.Retry == (backend.RetryPolicy{}) {
		o.Retry = backend.RetryPolicy{Wait: time.Millisecond}
	}
	var err error
	if w.store, err = registry.New(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.store.Close()
		server.Close()
		storage.Close()
	})
	return w
}

// push puts blobs into the registry.
func (w *world) push(blobs ...[]byte) []backend.Ref {
	w.t.Helper()
	p, err := w.store.Pusher(w.host + "/" + repo + ":latest")
	if err != nil {
		w.t.Fatal(err)
	}
	var refs []backend.Ref
	for _, b := range blobs {
		d := ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
		if err := p.Blob(w.t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }); err != nil {
			w.t.Fatal(err)
		}
		refs = append(refs, backend.Ref{Host: w.host, Repository: repo, Digest: d.Digest, Size: d.Size})
	}
	return refs
}

// redirect makes the registry send blob reads to the storage host.
func (w *world) redirect() { w.faults.Add(backendtest.BlobReads, -1, w.storage.Redirect(w.storageURL)) }

func (w *world) open(ref backend.Ref) backend.Blob {
	w.t.Helper()
	b, err := w.store.Open(w.t.Context(), ref)
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// secrets fails the test when err or the log holds one.
func (w *world) secrets(err error) {
	w.t.Helper()
	text := w.log.String() + fmt.Sprintf("%v %+v", err, err)
	for _, s := range []string{backendtest.Signature, "hunter2", "token-not-for-logs", base64.StdEncoding.EncodeToString([]byte("anna:hunter2")), "X-Sig"} {
		if strings.Contains(text, s) {
			w.t.Errorf("%q appears in the error or the log:\n%s", s, text)
		}
	}
}

func TestConformance(t *testing.T) {
	for name, setup := range map[string]func(*world){
		"direct":     func(*world) {},
		"redirected": func(w *world) { w.redirect() },
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
				w := newWorld(t, nil, registry.Options{})
				refs := w.push(blobs...)
				setup(w)
				return w.store, refs
			})
		})
	}
}

// TestRequests: opening a blob of known size costs no request, a read one, and
// connections are used again.
func TestRequests(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	data := backendtest.Bytes(100_000, 1)
	ref := w.push(data)[0]
	before, _ := w.faults.Requests()
	conns := w.conns.Load()
	b := w.open(ref)
	for i := range int64(10) {
		if err := b.ReadAt(t.Context(), make([]byte, 1000), i*1000); err != nil {
			t.Fatal(err)
		}
	}
	if all, _ := w.faults.Requests(); all-before != 10 {
		t.Errorf("%d requests for 10 reads", all-before)
	}
	if n := w.conns.Load() - conns; n != 0 {
		t.Errorf("%d new connections for 10 reads, one after the other", n)
	}
	ref.Size = 0
	if b = w.open(ref); b.Size() != int64(len(data)) {
		t.Errorf("size %d", b.Size())
	}
	if all, _ := w.faults.Requests(); all-before != 11 {
		t.Errorf("%d requests to learn the size", all-before-10)
	}
}

func TestFaults(t *testing.T) {
	const n, off = 5000, 1000
	for _, c := range []struct {
		name      string
		fault     backendtest.Action
		temporary bool
		is        error
		text      string
	}{
		{name: "401", fault: backendtest.Status(401), is: fs.ErrPermission, text: "401 Unauthorized"},
		{name: "403", fault: backendtest.Status(403), is: fs.ErrPermission, text: "403 Forbidden"},
		{name: "404", fault: backendtest.Status(404), is: fs.ErrNotExist, text: "404 Not Found"},
		{name: "416", fault: backendtest.Status(416), text: "416"},
		{name: "416 with another size", fault: backendtest.Status(416, "Content-Range", "bytes */77"), text: "has 77 bytes where it is stored and 100000"},
		{name: "429", fault: backendtest.TooMany(7), temporary: true, text: "429"},
		{name: "500", fault: backendtest.Status(500), temporary: true, text: "500"},
		{name: "204", fault: backendtest.Status(204), text: "204"},
		{name: "reset", fault: backendtest.Reset(10), temporary: true},
		{name: "stall before the headers", fault: backendtest.Stall(-1), temporary: true, text: "no progress for 100ms"},
		{name: "stall in the body", fault: backendtest.Stall(10), temporary: true, text: "no progress for 100ms"},
		{name: "drip", fault: backendtest.Drip(10, 10*time.Millisecond), temporary: true, text: "no progress for 100ms"},
		{name: "short body", fault: backendtest.Short(10), temporary: true, text: "asked for 5000 bytes, the server announces 4990"},
		{name: "long body", fault: func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			w.Header().Set("Content-Range", "bytes 1000-5999/100000")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(make([]byte, 5001)) // chunked: nothing announces the length
		}, text: "more than the 5000 bytes"},
		{name: "whole blob", fault: backendtest.Whole},
		{name: "other range", fault: backendtest.WrongRange("bytes 0-4999/100000"), text: "asked for bytes 1000 to 5999, the server sent 0 to 4999"},
		{name: "other size", fault: backendtest.WrongRange("bytes 1000-5999/6000"), text: "has 6000 bytes where it is stored and 100000"},
		{name: "no range", fault: backendtest.WrongRange(""), text: "content range"},
		{name: "mad range", fault: backendtest.WrongRange("bytes 1000-99999999999999999999/-1"), text: "content range"},
		{name: "encoded", fault: func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			w.Header().Set("Content-Encoding", "gzip")
			next.ServeHTTP(w, r)
		}, text: "as stored"},
		{name: "redirect for ever", fault: backendtest.Status(307, "Location", "/v2/?X-Sig="+backendtest.Signature), text: "redirected more than 10 times"},
		{name: "redirect to nowhere", fault: backendtest.Status(307, "Location", "http://u:hunter2@[::1]:1:2/?X-Sig="+backendtest.Signature)},
		{name: "redirect to a dead host", temporary: true, fault: backendtest.Status(307, "Location", "http://u:hunter2@127.0.0.1:1/?X-Sig="+backendtest.Signature)},
		{name: "redirect to another scheme", fault: backendtest.Status(307, "Location", "file:///etc/passwd?X-Sig="+backendtest.Signature)},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, nil, registry.Options{Stall: 100 * time.Millisecond})
			data := backendtest.Bytes(100_000, 1)
			b := w.open(w.push(data)[0])
			match, times := backendtest.BlobReads, 1
			if strings.Contains(c.name, "for ever") {
				match, times = backendtest.All, -1
			}
			w.faults.Add(match, times, c.fault)
			p := make([]byte, n)
			start := time.Now()
			err := b.ReadAt(t.Context(), p, off)
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
			w.secrets(err)
			if c.name == "whole blob" {
				if err != nil || !bytes.Equal(p, data[off:off+n]) {
					t.Errorf("error %v, or wrong bytes", err)
				}
			} else {
				if err == nil || !strings.Contains(err.Error(), c.text) || c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("error %v, want one with %q that is %v", err, c.text, c.is)
				}
				if backend.Temporary(err) != c.temporary {
					t.Errorf("Temporary is %v for %v", !c.temporary, err)
				}
			}
			w.faults.Clear()
			if err := b.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, data[off:off+n]) {
				t.Errorf("after the fault: error %v, or wrong bytes", err)
			}
		})
	}
}

// TestRangesIgnored: a whole blob for a range is read as far as that is cheap.
func TestRangesIgnored(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	data := backendtest.Bytes(1<<20, 1)
	ref := w.push(data)[0]
	w.faults.Add(backendtest.BlobReads, -1, backendtest.Whole)
	ref.Size = 0
	b := w.open(ref)
	for _, r := range [][2]int{{0, 1 << 20}, {0, 1}, {256 << 10, 1000}} {
		p := make([]byte, r[1])
		if err := b.ReadAt(t.Context(), p, int64(r[0])); err != nil || !bytes.Equal(p, data[r[0]:r[0]+r[1]]) {
			t.Errorf("%v: error %v, or wrong bytes", r, err)
		}
	}
	err := b.ReadAt(t.Context(), make([]byte, 10), 256<<10+1)
	if err == nil || backend.Temporary(err) || !strings.Contains(err.Error(), "does not support ranges") {
		t.Errorf("error %v", err)
	}
}

// TestRedirect: a storage address is used until it is refused, then renewed in
// the same read.
func TestRedirect(t *testing.T) {
	for _, code := range []int{400, 401, 403, 404, 410} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			w := newWorld(t, basicAuth, registry.Options{Credential: login})
			data := backendtest.Bytes(100_000, 1)
			ref := w.push(data)[0]
			w.redirect()
			_, before := w.faults.Requests()
			b := w.open(ref)
			read := func() {
				t.Helper()
				p := make([]byte, 1000)
				if err := b.ReadAt(t.Context(), p, 500); err != nil || !bytes.Equal(p, data[500:1500]) {
					t.Fatalf("error %v, or wrong bytes", err)
				}
			}
			for range 5 {
				read()
			}
			if _, n := w.faults.Requests(); n-before != 1 {
				t.Errorf("%d requests to the registry for 5 reads, want 1", n-before)
			}
			w.storage.Expire(code)
			for range 5 {
				read()
			}
			if _, n := w.faults.Requests(); n-before != 2 {
				t.Errorf("%d requests to the registry after the address expired, want 2", n-before)
			}

			// Refused again right after it was renewed: one error, no loop.
			w.storageFaults.Add(backendtest.All, -1, backendtest.Status(403))
			err := b.ReadAt(t.Context(), make([]byte, 10), 0)
			if !errors.Is(err, fs.ErrPermission) {
				t.Errorf("error %v, want fs.ErrPermission", err)
			}
			w.secrets(err)
			w.storageFaults.Clear()
			w.storageFaults.Add(backendtest.All, 1, backendtest.Reset(5))
			err = b.ReadAt(t.Context(), make([]byte, 10), 0)
			if !backend.Temporary(err) {
				t.Errorf("error %v, want a temporary one", err)
			}
			w.secrets(err)
			read()
			if n := w.storage.Leaked(); n != 0 {
				t.Errorf("%d requests took the credential or a referrer to the storage host", n)
			}
			if w.log.Len() == 0 {
				t.Error("nothing was logged, so the test of the log shows nothing")
			}
		})
	}
}

func login(context.Context, string) (auth.Credential, error) {
	return auth.Credential{Username: "anna", Password: "hunter2"}, nil
}

func basicAuth(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "anna" || password != "hunter2" {
			w.Header().Set("WWW-Authenticate", `Basic realm="demo"`)
			http.Error(w, "login", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// bearer is a token service and a registry that wants its tokens.
type bearer struct {
	next http.Handler

	mu        sync.Mutex
	epoch     int // tokens of older ones have expired
	issued    int
	anonymous bool
	broken    int // status of the token service; 0: well
}

func (b *bearer) token() string { return fmt.Sprintf("token-not-for-logs-%d", b.epoch) }

func (b *bearer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.URL.Path == "/token" {
		user, password, _ := r.BasicAuth()
		switch {
		case b.broken != 0:
			http.Error(w, "hunter2", b.broken)
		case !b.anonymous && (user != "anna" || password != "hunter2"):
			http.Error(w, "no", http.StatusUnauthorized)
		default:
			b.issued++
			json.NewEncoder(w).Encode(map[string]string{"token": b.token()})
		}
		return
	}
	if r.Header.Get("Authorization") != "Bearer "+b.token() {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token?secret=token-not-for-logs",service="demo",scope="repository:%s:pull,push"`, r.Host, repo))
		http.Error(w, "token", http.StatusUnauthorized)
		return
	}
	b.next.ServeHTTP(w, r)
}

func (b *bearer) set(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
}

func TestBearer(t *testing.T) {
	for name, credential := range map[string]func(context.Context, string) (auth.Credential, error){"anonymous": nil, "login": login} {
		t.Run(name, func(t *testing.T) {
			tokens := &bearer{anonymous: credential == nil}
			w := newWorld(t, func(next http.Handler) http.Handler {
				tokens.next = next
				return tokens
			}, registry.Options{Credential: credential})
			data := backendtest.Bytes(100_000, 1)
			ref := w.push(data)[0]
			w.redirect()
			b := w.open(ref)
			read := func() error {
				p := make([]byte, 1000)
				err := b.ReadAt(t.Context(), p, 500)
				w.secrets(err)
				if err == nil && !bytes.Equal(p, data[500:1500]) {
					t.Fatal("wrong bytes")
				}
				return err
			}
			if err := read(); err != nil {
				t.Fatal(err)
			}
			issued := tokens.issued

			// Both the token and the storage address expire: one read renews them.
			tokens.set(func() { tokens.epoch++ })
			w.storage.Expire(403)
			if err := read(); err != nil {
				t.Fatalf("after the token expired: %v", err)
			}
			if tokens.issued != issued+1 {
				t.Errorf("%d tokens for one that expired", tokens.issued-issued)
			}
			for _, code := range []int{401, 503} {
				tokens.set(func() { tokens.epoch++; tokens.broken = code })
				w.storage.Expire(403)
				err := read()
				if errors.Is(err, fs.ErrPermission) != (code == 401) || backend.Temporary(err) != (code == 503) {
					t.Errorf("token service says %d: error %v", code, err)
				}
			}
			tokens.set(func() { tokens.broken = 0 })
			if err := read(); err != nil {
				t.Errorf("after the token service is back: %v", err)
			}
			if w.storage.Leaked() != 0 {
				t.Error("the token went to the storage host")
			}
		})
	}
}

func TestBasic(t *testing.T) {
	w := newWorld(t, basicAuth, registry.Options{Credential: login})
	ref := w.push(backendtest.Bytes(10, 1))[0]
	for name, credential := range map[string]func(context.Context, string) (auth.Credential, error){
		"anonymous": nil,
		"wrong": func(context.Context, string) (auth.Credential, error) {
			return auth.Credential{Username: "anna", Password: "hunter2 not"}, nil
		},
	} {
		s, err := registry.New(registry.Options{PlainHTTP: true, Credential: credential})
		if err != nil {
			t.Fatal(err)
		}
		b, err := s.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		err = b.ReadAt(t.Context(), make([]byte, 1), 0)
		if !errors.Is(err, fs.ErrPermission) || backend.Temporary(err) {
			t.Errorf("%s: error %v, want fs.ErrPermission", name, err)
		}
		w.secrets(err)
		if _, err = s.Manifest(t.Context(), w.host+"/"+repo+":latest"); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%s: error %v, want fs.ErrPermission", name, err)
		}
		w.secrets(err)
		s.Close()
	}
	if _, err := w.store.Manifest(t.Context(), "http://anna:hunter2@host/repo:tag"); err == nil {
		t.Error("a URL with a login as reference is accepted")
	} else {
		w.secrets(err)
	}
	if _, err := w.store.Pusher("anna:hunter2@host/repo:tag"); err == nil {
		t.Error("a reference with a login is accepted")
	} else {
		w.secrets(err)
	}
}

func TestDockerCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	get := registry.DockerCredentials()
	if c, err := get(t.Context(), "r.example"); err != nil || c != auth.EmptyCredential {
		t.Errorf("no configuration: %v, error %v", c.Username, err)
	}
	config := fmt.Sprintf(`{"auths":{"r.example:5000":{"auth":%q}}}`, base64.StdEncoding.EncodeToString([]byte("anna:hunter2")))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := get(t.Context(), "r.example:5000"); err != nil || c.Username != "anna" || c.Password != "hunter2" {
		t.Errorf("login after the first look: %v, error %v", c.Username, err)
	}
	if c, err := get(t.Context(), "r.example"); err != nil || c != auth.EmptyCredential {
		t.Errorf("another port: %v, error %v", c.Username, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"auths":{"r.example:5000":{"auth":"hunter2`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := get(t.Context(), "r.example:5000"); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("broken configuration: error %v", err)
	}
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("HOME", "")
	if c, err := get(t.Context(), "r.example"); err != nil || c != auth.EmptyCredential {
		t.Errorf("no home: error %v", err)
	}
}

// TestCancel: a caller that leaves gets its own error at once, and keeps the
// storage address for others.
func TestCancel(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	ref := w.push(backendtest.Bytes(100_000, 1))[0]
	w.redirect()
	b := w.open(ref)
	p := make([]byte, 1000)
	if err := b.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	_, before := w.faults.Requests()
	for _, n := range []int{-1, 10} {
		w.storageFaults.Add(backendtest.All, 1, backendtest.Stall(n))
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(20*time.Millisecond, func() { cancel(errors.New("nobody waits")) })
		start := time.Now()
		err := b.ReadAt(ctx, p, 0)
		if took := time.Since(start); !errors.Is(err, context.Canceled) || took > 5*time.Second {
			t.Errorf("stalled after %d bytes: error %v after %v", n, err, took)
		}
		w.secrets(err)
	}
	if err := b.ReadAt(t.Context(), p, 0); err != nil {
		t.Error(err)
	}
	if _, n := w.faults.Requests(); n != before {
		t.Errorf("%d more requests to the registry, want none", n-before)
	}
}

// TestNames: nothing that a user or a manifest says can make up another URL.
func TestNames(t *testing.T) {
	s, err := registry.New(registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("x")
	for _, ref := range []backend.Ref{
		{Host: "", Repository: repo, Digest: d, Size: 1},
		{Host: "a:hunter2@host", Repository: repo, Digest: d, Size: 1},
		{Host: "host/path", Repository: repo, Digest: d, Size: 1},
		{Host: "host", Repository: "", Digest: d, Size: 1},
		{Host: "host", Repository: "../x", Digest: d, Size: 1},
		{Host: "host", Repository: "x?y", Digest: d, Size: 1},
		{Host: "host", Repository: repo, Digest: "sha256:..", Size: 1},
		{Host: "host", Repository: repo, Digest: d, Size: -1},
	} {
		if _, err := s.Open(t.Context(), ref); err == nil || backend.Temporary(err) {
			t.Errorf("%+v: error %v", ref, err)
		}
	}
}

func TestTLS(t *testing.T) {
	faults := backendtest.NewHTTPFaults(fakeregistry.New(fakeregistry.Logger(log.New(io.Discard, "", 0))))
	server := httptest.NewUnstartedServer(faults)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	host := strings.TrimPrefix(server.URL, "https://")
	w := &world{t: t, host: host, faults: faults}
	var err error
	if w.store, err = registry.New(registry.Options{HTTP: backend.HTTPOptions{CAFiles: []string{ca}}}); err != nil {
		t.Fatal(err)
	}
	defer w.store.Close()
	ref := w.push(backendtest.Bytes(1000, 1))[0]
	if err := w.open(ref).ReadAt(t.Context(), make([]byte, 1000), 0); err != nil {
		t.Errorf("with its CA: %v", err)
	}

	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	w.faults.Add(backendtest.BlobReads, 1, backendtest.Status(307, "Location", plain.URL))
	err = w.open(ref).ReadAt(t.Context(), make([]byte, 10), 0)
	if err == nil || !strings.Contains(err.Error(), "redirected from https to http") {
		t.Errorf("redirect to plain HTTP: error %v", err)
	}

	strict, err := registry.New(registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer strict.Close()
	b, err := strict.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.ReadAt(t.Context(), make([]byte, 1), 0); err == nil || backend.Temporary(err) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without its CA: error %v", err)
	}

	if err := os.WriteFile(ca, []byte("nothing"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := registry.New(registry.Options{HTTP: backend.HTTPOptions{CAFiles: []string{ca}}}); err == nil {
		t.Error("a CA file without a certificate is accepted")
	}
	if _, err := registry.New(registry.Options{HTTP: backend.HTTPOptions{CAFiles: []string{ca + "-missing"}}}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing CA file: error %v", err)
	}
}
