package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"syscall"
	"time"
)

// HTTPOptions are what all stores that speak HTTP share; the zero value is TLS with
// the system's certificate authorities.
type HTTPOptions struct {
	// CAFiles are PEM files of certificate authorities to trust besides the system's;
	// an empty name is none.
	CAFiles []string
	// SkipVerify accepts any certificate of a server.
	SkipVerify bool
	// ClientCert and ClientKey are PEM files that say who we are, both or none. They are
	// read again when they change; while that fails the old ones stay in use.
	ClientCert, ClientKey string
	// ConnectTimeout bounds making a connection, and the TLS handshake on it. 0: 10 s.
	ConnectTimeout time.Duration
	// Header is added to every request, also to those that follow a redirect. What
	// a request says itself stays, and a login, cookie, range or user agent is never
	// taken from here.
	Header http.Header
	// UserAgent is that of requests that have none. "": erofsd.
	UserAgent string
	// Socket is the path of a unix socket that all connections go to. "": TCP.
	Socket string
	// Proxy is a forward proxy. Without one, the environment's counts (HTTP_PROXY,
	// HTTPS_PROXY, NO_PROXY) unless NoEnvironmentProxy is set.
	Proxy              ProxyOptions
	NoEnvironmentProxy bool
	// Logger tells when the proxy goes and comes back. Nil: none.
	Logger *slog.Logger
}

// NewHTTPClient returns a client for ranges of blobs. It makes no request. It prefers
// HTTP/1.1: parallel ranges go over parallel connections, so that one lost packet or one
// slow flow-control window does not hold up all. Its CloseIdleConnections also ends
// what looks after the proxy; the client stays usable.
func NewHTTPClient(o HTTPOptions) (*http.Client, error) {
	set(&o.ConnectTimeout, 10*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	t, err := newTransport(o)
	if err != nil {
		return nil, err
	}
	var rt http.RoundTripper = t
	if o.Proxy.URL != "" {
		if rt, err = newProxied(t, o); err != nil {
			return nil, err
		}
	}
	h := &headers{next: rt, add: http.Header{}, userAgent: o.UserAgent}
	if h.userAgent == "" {
		h.userAgent = "erofsd"
	}
	for k, v := range o.Header {
		if k = http.CanonicalHeaderKey(k); !reserved(k) {
			h.add[k] = v
		}
	}
	return &http.Client{Transport: h, CheckRedirect: checkRedirect}, nil
}

func newTransport(o HTTPOptions) (*http.Transport, error) {
	dialer := &net.Dialer{Timeout: o.ConnectTimeout, KeepAlive: 30 * time.Second}
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		TLSHandshakeTimeout:    o.ConnectTimeout,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // a range is of the stored bytes
		Protocols:              new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	if o.Socket != "" {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, "unix", o.Socket)
			if errors.Is(err, syscall.EPERM) {
				err = fmt.Errorf("%w: the daemon's sandbox refuses unix sockets unless [image.backend.http-proxy] of its configuration names one, or it was started with --unix-sockets", err)
			}
			return c, err
		}
	}
	if o.NoEnvironmentProxy || o.Proxy.URL != "" || o.Socket != "" {
		t.Proxy = nil
	}
	var err error
	t.TLSClientConfig, err = newTLSConfig(o)
	return t, err
}

// headers adds fields to requests.
type headers struct {
	next      http.RoundTripper
	add       http.Header
	userAgent string
}

// reserved names the fields that are ours alone.
func reserved(name string) bool {
	switch name {
	case "Authorization", "Proxy-Authorization", "Cookie", "Range", "User-Agent", "Host", "Accept-Encoding",
		"Content-Length", "Transfer-Encoding", "Connection":
		return true
	}
	return false
}

// RoundTrip sends req with the fields that it lacks.
func (h *headers) RoundTrip(req *http.Request) (*http.Response, error) {
	original := req
	req = req.Clone(req.Context()) // a RoundTripper changes no request
	for k, v := range h.add {
		if _, there := req.Header[k]; !there {
			req.Header[k] = v
		}
	}
	if _, there := req.Header["User-Agent"]; !there {
		req.Header.Set("User-Agent", h.userAgent)
	}
	resp, err := h.next.RoundTrip(req)
	if err == nil {
		resp.Request = original
	}
	return resp, err
}

// CloseIdleConnections is what that of [http.Client] calls.
func (h *headers) CloseIdleConnections() {
	h.next.(interface{ CloseIdleConnections() }).CloseIdleConnections()
}

// checkRedirect guards every redirect. The referrer could be a signed URL, and a login is
// for one scheme, host and port, not for all ports of a host as net/http has it.
func checkRedirect(req *http.Request, via []*http.Request) error {
	req.Header.Del("Referer")
	if first := via[0].URL; req.URL.Scheme != first.Scheme || req.URL.Host != first.Host {
		req.Header.Del("Authorization")
	}
	if len(via) >= 10 {
		return errors.New("redirected more than 10 times")
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return errors.New("redirected from https to " + req.URL.Scheme + ", which is not protected")
	}
	return nil
}
