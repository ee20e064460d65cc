package smoke

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
)

// A client asks a daemon as nydus-snapshotter does.
type client struct {
	t      *testing.T
	socket string
	http   *http.Client
	own    *api.Client // of our own API
}

func newClient(t *testing.T, socket string) *client {
	tr := &http.Transport{
		MaxIdleConnsPerHost: 32,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}
	own := api.NewClient(socket)
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		own.Close()
	})
	return &client{t: t, socket: socket, http: &http.Client{Transport: tr, Timeout: patience}, own: own}
}

// do sends a request, with body in JSON unless it is nil, and returns the answer.
func (c *client) do(method, target string, body any) (status int, answer string, err error) {
	var r io.Reader
	if body != nil {
		p, err := json.Marshal(body)
		if err != nil {
			return 0, "", err
		}
		r = bytes.NewReader(p)
	}
	req, err := http.NewRequestWithContext(context.WithoutCancel(c.t.Context()), method, "http://unix"+target, r)
	if err != nil {
		return 0, "", err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	p, err := io.ReadAll(res.Body)
	return res.StatusCode, string(p), err
}

// want sends a request and checks the status; parts must be in the answer.
func (c *client) want(status int, method, target string, body any, parts ...string) string {
	c.t.Helper()
	got, answer, err := c.do(method, target, body)
	if err != nil {
		c.t.Errorf("%s %s: %v", method, target, err)
		return ""
	}
	if got != status {
		c.t.Errorf("%s %s: status %d, want %d: %s", method, target, got, status, answer)
	}
	for _, p := range parts {
		if !strings.Contains(answer, p) {
			c.t.Errorf("%s %s: want %q in %s", method, target, p, answer)
		}
	}
	return answer
}

// get decodes the answer into out.
func (c *client) get(target string, out any) {
	c.t.Helper()
	text := c.want(http.StatusOK, "GET", target, nil)
	if err := json.Unmarshal([]byte(text), out); err != nil {
		c.t.Errorf("GET %s: %v: %s", target, err, text)
	}
}

// state is the daemon's.
func (c *client) state() string {
	c.t.Helper()
	var info struct{ State string }
	c.get("/api/v1/daemon", &info)
	return info.State
}

func (c *client) wantState(want string) {
	c.t.Helper()
	if got := c.state(); got != want {
		c.t.Errorf("the daemon's state is %q, want %q", got, want)
	}
}

// unbind and cull are nydus-snapshotter's calls.
func (c *client) unbind(status int, domain, id string) string {
	c.t.Helper()
	q := url.Values{"domain_id": {domain}}
	if id != "" {
		q.Set("blob_id", id)
	}
	return c.want(status, "DELETE", "/api/v2/blobs?"+q.Encode(), nil)
}

func (c *client) cull(status int, id string) string {
	c.t.Helper()
	return c.want(status, "DELETE", "/api/v2/blobs?blob_id="+id, nil)
}

// A listed is an element of the list of blobs.
type listed struct {
	Type, ID string
	DomainID string `json:"domain_id"`
}

func (c *client) list(domain string) (l []listed) {
	c.t.Helper()
	c.get("/api/v2/blobs?domain_id="+domain, &l)
	return l
}

// A cacheMetrics is what nydus-snapshotter reads of the cache's metrics.
type cacheMetrics struct {
	Files    []string `json:"underlying_files"`
	Dir      string   `json:"store_path"`
	Prefetch uint64   `json:"prefetch_data_amount"`
	Complete bool     `json:"data_all_ready"`
}

func (c *client) cacheMetrics(id string) (m cacheMetrics) {
	c.t.Helper()
	c.get("/api/v1/metrics/blobcache?id="+url.QueryEscape(id), &m)
	return m
}
