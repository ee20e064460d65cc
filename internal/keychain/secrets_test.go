package keychain

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// fakeKube is as much of Kubernetes's API as secrets need.
type fakeKube struct {
	*httptest.Server
	t *testing.T

	mu      sync.Mutex
	version int
	secrets map[string]map[string]any // by namespace/name
	events  []map[string]any          // their index is their version - 1
	news    chan struct{}             // closed at the next event
	token   string
	refuse  int  // with this status
	gone    bool // watches are too far behind, until the next list
}

func newKube(t *testing.T) *fakeKube {
	k := &fakeKube{t: t, secrets: map[string]map[string]any{}, news: make(chan struct{}), token: "first-" + secretText}
	k.Server = httptest.NewTLSServer(k)
	t.Cleanup(k.Close)
	return k
}

// set makes a secret, or with an empty config removes it.
func (k *fakeKube) set(namespace, name, config string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version++
	o := map[string]any{
		"metadata": map[string]any{"namespace": namespace, "name": name, "resourceVersion": strconv.Itoa(k.version)},
		"type":     secretType, "data": map[string][]byte{".dockerconfigjson": []byte(config)},
	}
	kind := "MODIFIED"
	if config == "" {
		kind = "DELETED"
		delete(k.secrets, namespace+"/"+name)
	} else {
		k.secrets[namespace+"/"+name] = o
	}
	k.events = append(k.events, map[string]any{"type": kind, "object": o})
	close(k.news)
	k.news = make(chan struct{})
}

func (k *fakeKube) change(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
	close(k.news)
	k.news = make(chan struct{})
}

func (k *fakeKube) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	namespace := ""
	if rest, ok := strings.CutPrefix(r.URL.Path, "/api/v1/namespaces/"); ok {
		namespace = strings.TrimSuffix(rest, "/secrets") + "/"
	}
	q := r.URL.Query()
	k.mu.Lock()
	token, refuse, gone := k.token, k.refuse, k.gone
	k.mu.Unlock()
	switch {
	case r.Header.Get("Authorization") != "Bearer "+token:
		w.WriteHeader(http.StatusUnauthorized)
	case q.Get("fieldSelector") != "type="+secretType || !strings.HasSuffix(r.URL.Path, "/secrets"):
		w.WriteHeader(http.StatusBadRequest)
	case refuse != 0:
		w.WriteHeader(refuse)
	case q.Get("watch") != "":
		if gone {
			w.WriteHeader(http.StatusGone)
			return
		}
		k.watch(w, r, namespace)
	default:
		k.list(w, namespace, q)
	}
}

// list answers with one secret on each page.
func (k *fakeKube) list(w http.ResponseWriter, namespace string, q url.Values) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.gone = false
	items := []any{}
	for _, name := range slices.Sorted(maps.Keys(k.secrets)) {
		if strings.HasPrefix(name, namespace) {
			items = append(items, k.secrets[name])
		}
	}
	from, _ := strconv.Atoi(q.Get("continue"))
	meta := map[string]any{"resourceVersion": strconv.Itoa(k.version)}
	if from+1 < len(items) {
		meta["continue"] = strconv.Itoa(from + 1)
	}
	items = items[min(from, len(items)):]
	json.NewEncoder(w).Encode(map[string]any{"metadata": meta, "items": items[:min(1, len(items))]})
}

func (k *fakeKube) watch(w http.ResponseWriter, r *http.Request, namespace string) {
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	seen, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	for {
		k.mu.Lock()
		events, news, gone := k.events[seen:], k.news, k.gone
		seen = len(k.events)
		k.mu.Unlock()
		if gone {
			fmt.Fprintln(w, `{"type": "ERROR", "object": {"kind": "Status", "code": 410}}`)
			return
		}
		for _, e := range events {
			meta := e["object"].(map[string]any)["metadata"].(map[string]any)
			if strings.HasPrefix(meta["namespace"].(string)+"/", namespace) {
				json.NewEncoder(w).Encode(e)
			}
		}
		fmt.Fprintf(w, `{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "%d"}}}`+"\n", seen)
		w.(http.Flusher).Flush()
		select {
		case <-news:
		case <-r.Context().Done():
			return
		}
	}
}

// config writes a kubeconfig for the server, with the token in a file.
func (k *fakeKube) config() (file, tokenFile string) {
	k.t.Helper()
	dir := k.t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: k.Certificate().Raw})
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: {tokenFile: token}}]
`, k.URL, base64.StdEncoding.EncodeToString(ca))
	file, tokenFile = filepath.Join(dir, "config"), filepath.Join(dir, "token")
	for name, text := range map[string]string{file: text, tokenFile: k.token + "\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			k.t.Fatal(err)
		}
	}
	return file, tokenFile
}

// follow runs a provider until the end of t.
func follow(t *testing.T, config string, namespaces ...string) (*Secrets, chan struct{}, *testenv.Buffer) {
	t.Helper()
	changed, log := make(chan struct{}, 1), &testenv.Buffer{}
	s, err := NewSecrets(config, namespaces, changed, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		if strings.Contains(log.String(), "hunter2") {
			t.Errorf("logged: %s", log)
		}
	})
	return s, changed, log
}

// await waits until the login for an image is of user ("": there is none; "error").
func await(t *testing.T, s *Secrets, changed chan struct{}, image, user string) {
	t.Helper()
	for {
		l, err := s.Login(t.Context(), image)
		if err != nil {
			l.Username = "error"
		}
		if l.Username == user {
			return
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatalf("%s: user %q, %v; want %q", image, l.Username, err, user)
		}
	}
}

func auths(registry, user string) string {
	return fmt.Sprintf(`{"auths": {%q: {"username": %q, "password": "%s"}}}`, registry, user, secretText)
}

// TestSecrets follows what happens to secrets, with everything the API does.
func TestSecrets(t *testing.T) {
	k := newKube(t)
	k.set("team", "b", auths("r.example", "second"))
	k.set("team", "a", auths("r.example", "first"))
	k.set("team", "path", auths("r.example/path", "path"))
	k.set("other", "a", auths("*.example", "other"))
	k.set("team", "broken", "{")
	config, tokenFile := k.config()
	s, changed, _ := follow(t, config, "team")
	wide, wideChanged, _ := follow(t, config, "*")
	await(t, s, changed, "r.example/app:1", "first")
	await(t, s, changed, "r.example/path/app:1", "path")
	await(t, s, changed, "s.example/app:1", "")
	await(t, wide, wideChanged, "s.example/app:1", "other")
	await(t, wide, wideChanged, "r.example/app:1", "first")

	k.set("team", "a", auths("r.example", "changed"))
	await(t, s, changed, "r.example/app:1", "changed")
	k.set("team", "a", "")
	await(t, s, changed, "r.example/app:1", "second")
	k.set("other", "b", auths("s.example", "stranger"))
	await(t, wide, wideChanged, "s.example/app:1", "stranger")
	await(t, s, changed, "s.example/app:1", "")

	// The watch falls behind: a secret that went meanwhile is gone.
	k.change(func() { k.gone = true; delete(k.secrets, "team/b") })
	await(t, s, changed, "r.example/app:1", "")

	// The token is replaced, and all connections end.
	k.change(func() { k.token = "second-" + secretText })
	if err := os.WriteFile(tokenFile, []byte(k.token), 0o600); err != nil {
		t.Fatal(err)
	}
	k.CloseClientConnections()
	k.set("team", "c", auths("r.example", "third"))
	await(t, s, changed, "r.example/app:1", "third")
}

// TestSecretsRefused: what the API forbids is an error and not "no login"; it is mended
// without a restart, and what is known counts on.
func TestSecretsRefused(t *testing.T) {
	k := newKube(t)
	k.refuse = http.StatusForbidden
	config, _ := k.config()
	s, changed, log := follow(t, config, "team")
	await(t, s, changed, "r.example/app:1", "error")
	if _, err := s.Login(t.Context(), "r.example/app:1"); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("the error does not say why: %v", err)
	}
	if !strings.Contains(log.String(), "needs get, list and watch") {
		t.Errorf("log %s", log)
	}
	k.change(func() { k.refuse = 0 })
	k.set("team", "a", auths("r.example", "anna"))
	await(t, s, changed, "r.example/app:1", "anna")
	k.change(func() { k.refuse = http.StatusInternalServerError })
	k.CloseClientConnections()
	await(t, s, changed, "r.example/app:1", "anna")
}

// TestSecretsBounded: there may be any number of them.
func TestSecretsBounded(t *testing.T) {
	s := newSecrets(nil, nil, nil, slog.New(slog.DiscardHandler))
	for i := range 2 * maxSecrets {
		o := secret{Type: secretType, Data: map[string][]byte{".dockerconfigjson": []byte(auths("r.example", "anna"))}}
		o.Metadata.Name = strconv.Itoa(i)
		s.event("ADDED", o)
	}
	if len(s.secrets) != maxSecrets {
		t.Errorf("%d secrets are kept", len(s.secrets))
	}
}

// TestKubeconfig is the ways to log in, and what is refused.
func TestKubeconfig(t *testing.T) {
	k := newKube(t)
	config, _ := k.config()
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ old, new, want string }{
		"good":          {"", "", ""},
		"token":         {"tokenFile: token", "token: abc", ""},
		"no yaml":       {"apiVersion", "\t", "no kubeconfig"},
		"no context":    {"current-context: here", "current-context: there", "current-context"},
		"no user":       {"name: u,", "name: v,", "current-context"},
		"no cluster":    {"name: c,", "name: d,", "current-context"},
		"exec":          {"tokenFile: token", "exec: {command: x}", "exec"},
		"password":      {"tokenFile: token", "username: a, password: hunter2", "password"},
		"plain HTTP":    {"https://", "http://", "https only"},
		"no address":    {"https://", "ftp://", "address"},
		"no authority":  {"certificate-authority-data: ", "certificate-authority: missing, x: ", "certificate authority"},
		"bad authority": {"certificate-authority-data: ", "certificate-authority-data: x", "certificate authority"},
		"no key":        {"tokenFile: token", "client-certificate-data: eA==", "client key"},
		"no pair":       {"tokenFile: token", "client-certificate-data: eA==, client-key-data: eA==", "no pair"},
	} {
		file := filepath.Join(filepath.Dir(config), "changed")
		if err := os.WriteFile(file, []byte(strings.Replace(string(text), c.old, c.new, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := fromKubeconfig(file)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestInCluster is a pod with its service account.
func TestInCluster(t *testing.T) {
	k := newKube(t)
	dir := t.TempDir()
	if _, err := inCluster(dir); err == nil || !strings.Contains(err.Error(), "no pod") {
		t.Errorf("outside of a cluster: %v", err)
	}
	u, err := url.Parse(k.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", u.Hostname())
	t.Setenv("KUBERNETES_SERVICE_PORT", u.Port())
	if _, err := inCluster(dir); err == nil {
		t.Error("without an account")
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: k.Certificate().Raw})
	for name, p := range map[string][]byte{"ca.crt": ca, "token": []byte(k.token)} {
		if err := os.WriteFile(filepath.Join(dir, name), p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	api, err := inCluster(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer api.client.CloseIdleConnections()
	k.set("team", "a", auths("r.example", "anna"))
	found := 0
	if _, err := api.list(t.Context(), "team", func(secret) { found++ }); err != nil || found != 1 {
		t.Errorf("%d secrets, %v", found, err)
	}
}
