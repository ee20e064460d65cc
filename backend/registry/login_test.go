package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/registry"
)

// A tokenService gives out tokens, and stands before a registry that wants them.
type tokenService struct {
	realm    string       // its address, when it is not the registry's
	methods  string       // that it knows
	lifetime atomic.Int64 // in seconds; 0: not said
	epoch    atomic.Int64 // tokens of older ones are refused
	issued   atomic.Int64
	refused  atomic.Int64 // requests to the registry
	useless  atomic.Bool  // tokens are given out but never accepted
	delay    time.Duration
}

func (s *tokenService) token() string { return fmt.Sprintf("token-not-for-logs-%d", s.epoch.Load()) }

func (s *tokenService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != s.methods && s.methods != "" {
		http.Error(w, "hunter2", http.StatusMethodNotAllowed)
		return
	}
	if err := r.ParseForm(); err != nil {
		http.Error(w, "form", http.StatusBadRequest)
		return
	}
	user, password, _ := r.BasicAuth()
	if user != "anna" || password != "hunter2" || r.Form.Get("service") != "demo" || r.Form.Get("scope") == "" {
		http.Error(w, "hunter2", http.StatusUnauthorized)
		return
	}
	time.Sleep(s.delay)
	s.issued.Add(1)
	answer := map[string]any{"access_token": s.token()}
	if n := s.lifetime.Load(); n > 0 {
		answer["expires_in"] = n
	}
	json.NewEncoder(w).Encode(answer)
}

func (s *tokenService) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			s.ServeHTTP(w, r)
			return
		case r.Header.Get("Authorization") == "Bearer "+s.token() && !s.useless.Load():
			next.ServeHTTP(w, r)
			return
		}
		s.refused.Add(1)
		realm := s.realm
		if realm == "" {
			realm = "http://" + r.Host + "/token"
		}
		w.Header().Add("WWW-Authenticate", `Basic realm="other"`)
		w.Header().Add("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s",service="demo",scope="repository:%s:pull,push"`, realm, repo))
		http.Error(w, "token", http.StatusUnauthorized)
	})
}

// readAll reads the blob with n readers at once.
func readAll(t *testing.T, b backend.Blob, data []byte, n int) error {
	t.Helper()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			p := make([]byte, 1000)
			errs[i] = b.ReadAt(t.Context(), p, int64(i*100))
			if errs[i] == nil && !bytes.Equal(p, data[i*100:i*100+1000]) {
				t.Error("wrong bytes")
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// TestRenewedOnce: a token that expires in the middle of reads is renewed by one request
// for all readers, whether its service says when it expires or not.
func TestRenewedOnce(t *testing.T) {
	for _, lifetime := range []int64{0, 1} {
		t.Run(fmt.Sprint(lifetime), func(t *testing.T) {
			tokens := &tokenService{delay: 20 * time.Millisecond}
			tokens.lifetime.Store(lifetime)
			w := newWorld(t, tokens.guard, registry.Options{Credential: login})
			data := backendtest.Bytes(100_000, 1)
			b := w.open(w.push(data)[0])
			for round := range 3 {
				tokens.epoch.Add(1)
				tokens.refused.Store(0)
				if lifetime > 0 {
					time.Sleep(time.Second) // it expires by itself
				}
				before := tokens.issued.Load()
				if err := readAll(t, b, data, 64); err != nil {
					t.Fatal(err)
				}
				if n := tokens.issued.Load() - before; n != 1 {
					t.Errorf("%d token requests for 64 readers", n)
				}
				if lifetime > 0 && round > 0 && tokens.refused.Load() > 0 {
					t.Errorf("%d requests with a token that was known to have expired", tokens.refused.Load())
				}
			}
			w.secrets(nil)
		})
	}
}

// TestTokenServices: one that knows only GET or only POST is asked in the wrong way once,
// and a registry that refuses its own token is not asked for ever.
func TestTokenServices(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		t.Run(method, func(t *testing.T) {
			tokens := &tokenService{methods: method}
			elsewhere := backendtest.NewHTTPFaults(tokens)
			server := httptest.NewServer(elsewhere) // on another port: another host
			defer server.Close()
			tokens.realm = server.URL + "/auth?account=x"
			w := newWorld(t, tokens.guard, registry.Options{Credential: login})
			data := backendtest.Bytes(100_000, 1)
			b := w.open(w.push(data)[0])
			before, _ := elsewhere.Requests()
			for range 3 {
				tokens.epoch.Add(1)
				if err := readAll(t, b, data, 1); err != nil {
					t.Fatal(err)
				}
			}
			if after, _ := elsewhere.Requests(); after-before != 3 {
				t.Errorf("%d requests for 3 tokens", after-before)
			}
			tokens.useless.Store(true)
			err := readAll(t, b, data, 1)
			if !errors.Is(err, fs.ErrPermission) || backend.Temporary(err) {
				t.Errorf("refused twice: error %v", err)
			}
			w.secrets(err)
		})
	}
}

// TestTokenRedirect: a token service cannot pass a password on.
func TestTokenRedirect(t *testing.T) {
	var got atomic.Int64
	thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { got.Add(1) }))
	defer thief.Close()
	guard := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				http.Redirect(w, r, thief.URL, http.StatusTemporaryRedirect)
				return
			}
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token?sig=hunter2"`)
			w.WriteHeader(http.StatusUnauthorized)
		})
	}
	w := newWorld(t, guard, registry.Options{Credential: login})
	b := w.open(backend.Ref{Host: w.host, Repository: repo, Digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000", Size: 10})
	err := b.ReadAt(t.Context(), make([]byte, 1), 0)
	if err == nil || got.Load() != 0 {
		t.Errorf("%d requests to the other host, error %v", got.Load(), err)
	}
	w.secrets(err)
}

// TestAs: images with different logins share connections, those with the same share
// tokens, and none gets what another may read.
func TestAs(t *testing.T) {
	tokens := &tokenService{}
	w := newWorld(t, tokens.guard, registry.Options{})
	static := func(login string) registry.CredentialFunc {
		c, err := registry.StaticCredential(w.host, base64.StdEncoding.EncodeToString([]byte(login)))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	data := backendtest.Bytes(100_000, 1)
	anonymous := w.store
	w.store = anonymous.As(static("anna:hunter2"))
	ref := w.push(data)[0]
	issued, conns := tokens.issued.Load(), w.conns.Load()
	for i, c := range []struct {
		store *registry.Store
		ok    bool
	}{
		{anonymous.As(static("anna:hunter2")), true},
		{anonymous.As(static("anna:hunter2")), true},
		{anonymous, false},
		{anonymous.As(static("berta:hunter2")), false},
		{anonymous.As(registry.TokenCredential(w.host, tokens.token(), nil)), true},
		{anonymous.As(registry.TokenCredential(w.host, "old", nil)), false},
		{anonymous.As(registry.TokenCredential(w.host, "old", static("anna:hunter2"))), true},
		{anonymous.As(registry.TokenCredential("elsewhere", tokens.token(), nil)), false},
	} {
		b, err := c.store.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		err = readAll(t, b, data, 1)
		if (err == nil) != c.ok || !c.ok && !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%d: error %v, want success %v", i, err, c.ok)
		}
		w.secrets(err)
	}
	// The push was for another scope. After a refusal the token for reading is known.
	if n := tokens.issued.Load() - issued; n > 1 {
		t.Errorf("%d tokens for the same login", n)
	}
	if n := w.conns.Load() - conns; n > 0 {
		t.Errorf("%d new connections, one read after the other", n)
	}
	for _, bad := range []string{"", "hunter2", base64.StdEncoding.EncodeToString([]byte("hunter2")), base64.StdEncoding.EncodeToString([]byte(":hunter2"))} {
		if _, err := registry.StaticCredential("h", bad); err == nil {
			t.Errorf("%q is accepted", bad)
		} else {
			w.secrets(err)
		}
	}
}

// TestRenewalLeft: a reader that leaves takes the renewal with it only when it is the last.
func TestRenewalLeft(t *testing.T) {
	asked, answer := make(chan struct{}, 10), make(chan struct{})
	credential := func(ctx context.Context, _ string) (auth.Credential, error) {
		asked <- struct{}{}
		select {
		case <-answer:
			return auth.Credential{Username: "anna", Password: "hunter2"}, nil
		case <-ctx.Done():
			return auth.EmptyCredential, ctx.Err()
		}
	}
	w := newWorld(t, basicAuth, registry.Options{Credential: login})
	data := backendtest.Bytes(100_000, 1)
	ref := w.push(data)[0]
	b, err := w.store.As(credential).Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	ctx, leave := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- b.ReadAt(ctx, make([]byte, 10), 0) }()
	<-asked
	leave()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the reader that left: %v", err)
	}
	go func() { second <- b.ReadAt(t.Context(), make([]byte, 10), 0) }()
	<-asked
	close(answer)
	if err := <-second; err != nil {
		t.Errorf("the one that came after: %v", err)
	}
}

func TestFaultTable(t *testing.T) {
	for name, redirected := range map[string]bool{"direct": false, "redirected": true} {
		t.Run(name, func(t *testing.T) {
			backendtest.Faults(t, func(t *testing.T, stall time.Duration, blobs ...[]byte) backendtest.Faulty {
				w := newWorld(t, basicAuth, registry.Options{Credential: login, Stall: stall})
				f := backendtest.Faulty{Store: w.store, Refs: w.push(blobs...), Faults: w.faults, Secrets: []string{"hunter2", backendtest.Signature}}
				if redirected {
					w.redirect()
					f.Faults = w.storageFaults
				}
				return f
			})
		})
	}
}
