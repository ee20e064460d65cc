package containerd

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
)

// A front stands before the registry and counts what is fetched of it.
type front struct {
	addr string

	mu    sync.Mutex // guards bytes
	bytes map[digest.Digest]int64
}

// newFront stands before the registry at addr, for as long as t.
func newFront(t *testing.T, addr string) *front {
	t.Helper()
	f := &front{bytes: map[digest.Digest]int64{}}
	transport := &http.Transport{}
	server := httptest.NewServer(&httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: addr})
			r.Out.Host = r.In.Host // the registry makes addresses of it
		},
		ModifyResponse: func(r *http.Response) error {
			if r.Request.Method == http.MethodGet && strings.Contains(r.Request.URL.Path, "/blobs/") {
				r.Body = &counted{r.Body, f, digest.Digest(path.Base(r.Request.URL.Path))}
			}
			return nil
		},
	})
	t.Cleanup(func() {
		server.Close()
		transport.CloseIdleConnections()
	})
	f.addr = strings.TrimPrefix(server.URL, "http://")
	return f
}

// fetched is how many bytes of a blob were.
func (f *front) fetched(blob digest.Digest) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bytes[blob]
}

// counted is a body that is counted.
type counted struct {
	io.ReadCloser
	front *front
	blob  digest.Digest
}

// Read counts.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.front.mu.Lock()
	defer c.front.mu.Unlock()
	c.front.bytes[c.blob] += int64(n)
	return n, err
}
