package nydus

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// A Client talks to a nydusd at a unix socket. It is safe for concurrent use. A refusal by
// nydusd is an *Error; any other error means that it could not be asked.
type Client struct {
	socket string
	http   *http.Client
}

// clientTime is how long nydusd may take for an answer: it does one call after the other.
const clientTime = 30 * time.Second

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 16 << 20

// NewClient returns a client of the nydusd at socket. It connects at the first call.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: &http.Client{Timeout: clientTime, Transport: &http.Transport{DialContext: dial}}}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Info returns what nydusd is and does.
func (c *Client) Info(ctx context.Context) (i DaemonInfo, err error) {
	return i, c.call(ctx, http.MethodGet, "/api/v1/daemon", nil, nil, &i)
}

// PutBlob registers what entry, a document of nydusd's, describes.
func (c *Client) PutBlob(ctx context.Context, entry any) error {
	return c.call(ctx, http.MethodPut, "/api/v2/blobs", nil, entry, nil)
}

// DeleteBlobs unregisters everything in a domain; nothing there is success.
func (c *Client) DeleteBlobs(ctx context.Context, domainID string) error {
	return c.call(ctx, http.MethodDelete, "/api/v2/blobs", url.Values{"domain_id": {domainID}}, nil, nil)
}

// CullBlob removes the cache files of a blob in all domains; none is success.
func (c *Client) CullBlob(ctx context.Context, blobID string) error {
	return c.call(ctx, http.MethodDelete, "/api/v2/blobs", url.Values{"blob_id": {blobID}}, nil, nil)
}

// Mount mounts what m says at a mount point in nydusd's own file system.
func (c *Client) Mount(ctx context.Context, mountpoint string, m MountCommand) error {
	body := mountBody{Source: &m.Source, Type: string(m.Type), Config: &m.Config, PrefetchFiles: m.PrefetchFiles}
	return c.call(ctx, http.MethodPost, "/api/v1/mount", url.Values{"mountpoint": {mountpoint}}, body, nil)
}

// Unmount undoes Mount.
func (c *Client) Unmount(ctx context.Context, mountpoint string) error {
	return c.call(ctx, http.MethodDelete, "/api/v1/mount", url.Values{"mountpoint": {mountpoint}}, nil, nil)
}

// SetConfig changes values of a configuration, of [ConfigKeys].
func (c *Client) SetConfig(ctx context.Context, id string, values map[string]string) error {
	return c.call(ctx, http.MethodPut, "/api/v1/config", url.Values{"id": {id}}, values, nil)
}

// CacheMetrics returns what is counted of a cache.
func (c *Client) CacheMetrics(ctx context.Context, id string) (m CacheMetrics, err error) {
	return m, c.call(ctx, http.MethodGet, "/api/v1/metrics/blobcache", url.Values{"id": {id}}, nil, &m)
}

// call sends in (nil: no body) and decodes the answer into out (nil: it has no body). The
// errors have nothing of in.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	var body io.Reader // nydusd takes none in chunks; of a Reader the length is known
	if in != nil {
		p, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(p)
	}
	target := url.URL{Scheme: "http", Host: "nydusd", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, target.String(), body)
	if err != nil {
		return fmt.Errorf("ask nydusd at %s: %w", c.socket, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask nydusd at %s: %w", c.socket, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	switch {
	case err != nil:
		return fmt.Errorf("ask nydusd at %s: %w", c.socket, err)
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent:
		return refusal(resp.StatusCode, text)
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("decode answer of nydusd at %s: %w", c.socket, err)
	}
	return nil
}

// refusal is the error that an answer with a bad status says.
func refusal(status int, text []byte) error {
	var said struct {
		Message string `json:"message"`
	}
	if err := json.Unmarshal(text, &said); err != nil || said.Message == "" {
		said.Message = fmt.Sprintf("%s: %.200q", http.StatusText(status), text)
	}
	return &Error{Status: status, Words: said.Message, Bare: true}
}

// IsExists reports whether nydusd has such a thing already.
func IsExists(err error) bool { return says(err, "already exists", "alreadyexists", "already mounted") }

// IsNoEntry reports whether nydusd knows of no such thing.
func IsNoEntry(err error) bool {
	return says(err, "entry not found", "no such file or directory", "notfound")
}

// IsRefused reports whether nydusd has answered, and refused.
func IsRefused(err error) bool { return errors.As(err, new(*Error)) }

// IsNotFound reports whether nydusd has no such route, or counts nothing of an id.
func IsNotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// says reports whether nydusd has answered with one of words, which are in lower case: it has
// one status for almost everything.
func says(err error, words ...string) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	text := strings.ToLower(e.Words)
	return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(text, w) })
}
