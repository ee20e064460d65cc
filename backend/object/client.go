package object

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/erofsd/erofsd/backend"
)

// maxRefusal is how much of the body of an error answer is read.
const maxRefusal = 16 << 10

// A Client is an HTTP client under a vendor's client, which reads the whole body of an
// error answer and signs headers that must reach no other host.
type Client struct{ http *http.Client }

// NewClient returns a client. It makes no request.
func NewClient(o backend.HTTPOptions) (*Client, error) {
	c, err := backend.NewHTTPClient(o)
	if err != nil {
		return nil, err
	}
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{c}, nil
}

// Do sends req, follows no redirect and bounds the body of what is not an answer of 2xx.
func (c *Client) Do(req *http.Request) (*http.Response, error) {
	if req.ContentLength == 0 && req.Body != nil {
		// With the empty body that some clients give, net/http would not send a
		// request again that met a connection which the server had just closed.
		req.Body.Close()
		req.Body = http.NoBody
	}
	resp, err := c.http.Do(req)
	if err == nil && resp.StatusCode/100 != 2 {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxRefusal), resp.Body}
	}
	return resp, err
}

// Close closes idle connections. The client stays usable.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Refusal describes an error answer of which a vendor's client has read the body. code
// is the error code in it: all that is kept, for a message may echo what was signed.
func Refusal(resp *http.Response, code string) *backend.StatusError {
	e := backend.NewStatusError(resp)
	if isCode(code) {
		e.Reason = code
	}
	return e
}

// isCode reports whether s looks like NoSuchKey and not like a part of a request.
func isCode(s string) bool {
	for _, c := range s {
		if (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return len(s) <= 40
}

// Base checks scheme ("" is https) and endpoint (host or host:port) and makes a URL of
// them.
func Base(scheme, endpoint string) (*url.URL, error) {
	switch scheme {
	case "":
		scheme = "https"
	case "http", "https":
	default:
		return nil, fmt.Errorf("scheme %q: write http or https", scheme)
	}
	if strings.Contains(endpoint, "@") {
		return nil, errors.New("endpoint holds a login: write host or host:port")
	}
	u, err := url.Parse(scheme + "://" + endpoint)
	if err != nil || u.Host == "" || u.Host != endpoint {
		return nil, fmt.Errorf("endpoint %q: write host or host:port", endpoint)
	}
	return u, nil
}

// CheckBucket returns an error unless name can be a part of a URL.
func CheckBucket(name string) error {
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return fmt.Errorf("bucket name %q has a character that none has", name)
		}
	}
	if strings.Trim(name, ".") == "" {
		return errors.New("no bucket name is given")
	}
	return nil
}
