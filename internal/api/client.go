package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
)

// A Client talks to the daemon at a unix socket. It is safe for concurrent use.
type Client struct {
	socket string
	http   *http.Client
}

var _ Service = (*Client)(nil)

// NewClient returns a client of the daemon at socket. It connects at the first call.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Mount mounts an image and returns when it can be read.
func (c *Client) Mount(ctx context.Context, r MountRequest) (m Mount, err error) {
	return m, c.call(ctx, http.MethodPost, "/images/mount", r, &m)
}

// Unmount unmounts an image.
func (c *Client) Unmount(ctx context.Context, r UnmountRequest) error {
	return c.act(ctx, "/images/unmount", r)
}

// BindImage makes an image known.
func (c *Client) BindImage(ctx context.Context, r BindRequest) error {
	return c.act(ctx, "/images/bind", r)
}

// UnbindImage forgets a bound image.
func (c *Client) UnbindImage(ctx context.Context, r ImageRequest) error {
	return c.act(ctx, "/images/unbind", r)
}

// Remove removes an image that is not in use from the cache.
func (c *Client) Remove(ctx context.Context, r RemoveRequest) error {
	return c.act(ctx, "/images/remove", r)
}

// Pin has a full cache keep an image, or not any more.
func (c *Client) Pin(ctx context.Context, r PinRequest) error { return c.act(ctx, "/images/pin", r) }

// Prefetch has files of a mounted image fetched; it does not wait for them.
func (c *Client) Prefetch(ctx context.Context, r PrefetchRequest) error {
	return c.act(ctx, "/images/prefetch", r)
}

// Usage returns what an image takes.
func (c *Client) Usage(ctx context.Context, r ImageRequest) (u Usage, err error) {
	return u, c.call(ctx, http.MethodPost, "/images/usage", r, &u)
}

// Cache returns what the cache takes.
func (c *Client) Cache(ctx context.Context) (a Cache, err error) {
	return a, c.call(ctx, http.MethodGet, "/cache", nil, &a)
}

// Evict makes room in the cache and returns what it takes then.
func (c *Client) Evict(ctx context.Context, r EvictRequest) (a Cache, err error) {
	return a, c.call(ctx, http.MethodPost, "/cache/evict", r, &a)
}

// Upgrade replaces the daemon's worker. When it returns the successor is about to take
// over; requests that come meanwhile wait for it.
func (c *Client) Upgrade(ctx context.Context, r UpgradeRequest) error {
	return c.act(ctx, "/upgrade", r)
}

// Scrub verifies what the cache has and returns when that is done; the end of ctx ends it.
func (c *Client) Scrub(ctx context.Context, r ScrubRequest) (s Scrub, err error) {
	return s, c.call(ctx, http.MethodPost, "/cache/scrub", r, &s)
}

// Status returns the daemon's state.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, http.MethodGet, "/status", nil, &s)
}

// Version returns what runs.
func (c *Client) Version(ctx context.Context) (v VersionInfo, err error) {
	return v, c.call(ctx, http.MethodGet, "/version", nil, &v)
}

// Health asks whether the daemon serves the kernel.
func (c *Client) Health(ctx context.Context) error {
	return c.call(ctx, http.MethodGet, "/health", nil, &struct{}{})
}

// act is a call without an answer.
func (c *Client) act(ctx context.Context, path string, in any) error {
	return c.call(ctx, http.MethodPost, path, in, &struct{}{})
}

// Close drops idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// call sends in (nil: no body) and decodes the answer into out. A refusal by
// the daemon is an *Error; anything else means that it could not be asked.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		p, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(p)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://erofsd"+Prefix+path, body)
	if err != nil {
		return fmt.Errorf("ask daemon at %s: %w", c.socket, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask daemon at %s: %w", c.socket, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		e := &Error{Status: resp.StatusCode}
		if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(e); err != nil || e.Message == "" {
			e.Message = fmt.Sprintf("daemon at %s answered %s", c.socket, resp.Status)
		}
		return e
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("decode answer of daemon at %s: %w", c.socket, err)
	}
	return nil
}
