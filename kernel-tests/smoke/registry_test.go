package smoke

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// A registry serves the blobs of an image to whoever knows its password, which can be
// changed.
type registry struct {
	*httptest.Server
	image *image

	mu       sync.Mutex // guards what follows
	password string
	refused  int // requests with another one
	served   int
}

// newRegistry starts one that ends with the test.
func newRegistry(t *testing.T, i *image, password string) *registry {
	r := &registry{image: i, password: password}
	r.Server = httptest.NewServer(r)
	t.Cleanup(func() {
		r.CloseClientConnections()
		r.Close()
	})
	return r
}

// ServeHTTP answers requests for blobs.
func (r *registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	_, password, _ := q.BasicAuth()
	r.mu.Lock()
	right := password == r.password
	if right {
		r.served++
	} else {
		r.refused++
	}
	r.mu.Unlock()
	if !right {
		w.Header().Set("WWW-Authenticate", `Basic realm="smoke"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	id, ok := strings.CutPrefix(q.URL.Path, "/v2/smoke/image/blobs/sha256:")
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeFile(w, q, filepath.Join(r.image.dir, filepath.Base(id)))
}

// change makes another password the right one.
func (r *registry) change(password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.password = password
}

func (r *registry) counts() (served, refused int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.served, r.refused
}

// auth is a password as nydus's configuration has it.
func auth(password string) string {
	return base64.StdEncoding.EncodeToString([]byte("user:" + password))
}

// use makes the registry, with a password, where s gets its data.
func (r *registry) use(s *snapshot, password string) {
	c := &s.entry.Config
	c.BackendType = "registry"
	c.BackendConfig, _ = json.Marshal(map[string]any{
		"readahead": false, "host": strings.TrimPrefix(r.URL, "http://"), "repo": "smoke/image", "auth": auth(password), "scheme": "http",
		"proxy": map[string]any{"fallback": false}, "timeout": 5, "connect_timeout": 5, "retry_limit": 2,
	})
}
