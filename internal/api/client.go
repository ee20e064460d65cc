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
func (c *Client) Mount(ctx context.Context, r MountRequest) (Mount, error) {
	var m Mount
	err := c.call(ctx, http.MethodPost, "/v1/mount", r, &m)
	return m, err
}

// Unmount unmounts an image.
func (c *Client) Unmount(ctx context.Context, r UnmountRequest) error {
	return c.call(ctx, http.MethodPost, "/v1/unmount", r, &struct{}{})
}

// Remove removes an image that is not in use from the cache.
func (c *Client) Remove(ctx context.Context, r RemoveRequest) error {
	return c.call(ctx, http.MethodPost, "/v1/remove", r, &struct{}{})
}

// Status returns the daemon's state.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
	return s, err
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
	req, err := http.NewRequestWithContext(ctx, method, "http://erofsd"+path, body)
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
