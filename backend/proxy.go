package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"time"
)

// ProxyOptions describe a forward proxy, such as Dragonfly's. The zero value is none.
//
// Reads that fail because of the proxy go around it when Fallback is set: a connection
// that fails or stalls, an answer of 500 and above, a 429 that the proxy itself gives. A 403
// that the proxy itself gives is final. Without Fallback such reads fail, so that a
// retry meets the proxy again, and an unhealthy proxy fails them at once.
type ProxyOptions struct {
	// URL is http or https; a user and password in it are for the proxy. "": no proxy.
	URL string
	// PingURL is asked whether the proxy is well, directly. "": only failures tell.
	PingURL string
	// Fallback lets reads go around a proxy that fails.
	Fallback bool
	// LastTryDirect is nydusd's meaning of no Fallback: the last attempt of a read
	// that somebody waits for goes around a proxy that is up but did not deliver, and
	// one that is refused with a 429 of the proxy does so at once.
	LastTryDirect bool
	// CheckInterval is the time between two pings, and between two trials of a proxy
	// without PingURL that is down. 0: 5 s.
	CheckInterval time.Duration
	// CheckPause is how long after the last request pings go on. 0: 300 s.
	CheckPause time.Duration
	// Timeout bounds the wait for the head of an answer. 0: 5 s.
	Timeout time.Duration
	// UseHTTP asks the proxy for http where the address says https, so that it sees
	// what is read and can share it. It speaks TLS itself then.
	UseHTTP bool
}

// proxied sends requests to a proxy, and around it.
type proxied struct {
	o           ProxyOptions
	via, direct *http.Transport
	health      *health
	log         *slog.Logger
}

// newProxied returns a transport that makes connections as t does.
func newProxied(t *http.Transport, o HTTPOptions) (*proxied, error) {
	u, err := url.Parse(o.Proxy.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		// The text of err would hold the password.
		return nil, errors.New("proxy URL is not of the form http://host:port or https://host:port")
	}
	p := &proxied{o: o.Proxy, via: t.Clone(), direct: t, log: o.Logger}
	set(&p.o.Timeout, 5*time.Second)
	p.via.Proxy = http.ProxyURL(u)
	p.via.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, req *http.Request, resp *http.Response) error {
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		status := NewStatusError(resp)
		status.URL = req.Host
		return &proxyError{err: status, refused: ours(resp)}
	}
	var ping func(context.Context) error
	if o.Proxy.PingURL != "" {
		ping = Ping(&http.Client{Transport: p.direct}, o.Proxy.PingURL, nil)
	}
	p.health = newHealth(ping, p.o.CheckInterval, p.o.CheckPause, 0, p.changed)
	return p, nil
}

func (p *proxied) changed(well bool, why error) {
	switch {
	case well:
		p.log.Info("Backend proxy recovered")
	case p.o.Fallback:
		p.log.Warn("Detected proxy unhealthy, fallback to the origin", "err", why)
	default:
		p.log.Warn("Detected proxy unhealthy, reads fail until it is back", "err", why)
	}
}

// CloseIdleConnections also ends the pings.
func (p *proxied) CloseIdleConnections() {
	p.health.close()
	p.via.CloseIdleConnections()
	p.direct.CloseIdleConnections()
}

// RoundTrip sends req to the proxy, or around it where the options allow that.
func (p *proxied) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	if private(ctx) {
		return p.privately(req)
	}
	healthy := p.health.use()
	t := tryOf(ctx)
	avoid := t.around.Load() || fromOrigin(ctx)
	around := avoid && (p.o.Fallback || p.o.LastTryDirect && t.last && PriorityOf(ctx) == OnDemand)
	switch {
	case healthy && around, !healthy && p.o.Fallback:
		return p.direct.RoundTrip(req)
	case !healthy:
		return nil, &proxyError{err: errors.New("it is unhealthy, and there is no fallback")}
	}
	resp, err := p.ask(req, t)
	why := p.fault(req, resp, err)
	if why == nil {
		return resp, err
	}
	if p.o.Fallback || !why.down {
		t.around.Store(true)
	}
	direct := p.bypass(ctx, t, why) && (req.Method == http.MethodGet || req.Method == http.MethodHead) && ctx.Err() == nil
	if resp != nil && !direct && !why.refused {
		return resp, nil // it may be the origin's answer
	}
	if resp != nil {
		resp.Body.Close()
	}
	if !direct {
		return nil, why
	}
	p.log.Debug("proxy failed, fallback to the origin for this request", "err", why)
	return p.direct.RoundTrip(req)
}

// bypass reports whether a request that the proxy failed goes around it at once.
func (p *proxied) bypass(ctx context.Context, t try, why *proxyError) bool {
	status, _ := errors.AsType[*StatusError](why)
	limited := status != nil && status.Code == http.StatusTooManyRequests
	switch {
	case status != nil && status.Code < 500 && !limited:
		return false // it forbids
	case limited && PriorityOf(ctx) == Prefetch:
		return false // what nobody waits for is not worth the origin's time
	case p.o.Fallback:
		return true
	}
	return p.o.LastTryDirect && PriorityOf(ctx) == OnDemand && !why.down && (limited || t.last)
}

// fault says how the proxy failed, nil when it did not. It keeps its health.
func (p *proxied) fault(req *http.Request, resp *http.Response, err error) *proxyError {
	switch {
	case err != nil && req.Context().Err() != nil:
		// Whoever asked left, or saw no progress.
		if _, stalled := errors.AsType[stallError](context.Cause(req.Context())); !stalled {
			return nil
		}
		fallthrough
	case err != nil:
		if known, ok := errors.AsType[*proxyError](err); ok {
			p.health.well() // it refused a tunnel
			return known
		}
		p.health.failed(err)
		_, slow := errors.AsType[stallError](err)
		return &proxyError{err: RedactError(err), down: !slow}
	}
	p.health.well()
	refused := ours(resp) && (resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusForbidden)
	if refused || resp.StatusCode >= 500 {
		limited := resp.StatusCode == http.StatusTooManyRequests && PriorityOf(req.Context()) == Prefetch
		return &proxyError{err: NewStatusError(resp), refused: refused, final: refused && limited}
	}
	return nil
}

// ours reports whether resp is the proxy's own and not passed on.
func ours(resp *http.Response) bool { return resp.Header.Get("X-Dragonfly-Error-Type") == "proxy" }

// ask sends req to the proxy. A body that breaks off is remembered in t.
func (p *proxied) ask(req *http.Request, t try) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	out := req.Clone(ctx)
	if p.o.UseHTTP && out.URL.Scheme == "https" {
		out.URL.Scheme = "http"
	}
	if req.Method == http.MethodGet {
		out.Header.Set("X-Dragonfly-Use-P2P", "true")
		out.Header.Set("X-Dragonfly-Prefetch", "true")
		out.Header.Set("X-Dragonfly-Priority", "6")
		if PriorityOf(ctx) == Prefetch {
			out.Header.Set("X-Dragonfly-Priority", "3")
		}
	}
	slow := time.AfterFunc(p.o.Timeout, func() { cancel(stallError(p.o.Timeout)) })
	if req.Body != nil && req.Body != http.NoBody {
		slow.Stop() // an upload takes as long as it takes
	}
	resp, err := p.via.RoundTrip(out)
	slow.Stop()
	if stalled, ok := errors.AsType[stallError](context.Cause(ctx)); ok && err != nil {
		err = stalled
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	resp.Body = &proxiedBody{ReadCloser: resp.Body, p: p, t: t, cancel: cancel, ctx: ctx}
	return resp, nil
}

// privately sends req directly, and through the proxy when there is no other way: by a
// tunnel, in which it sees nothing.
func (p *proxied) privately(req *http.Request) (*http.Response, error) {
	resp, err := p.direct.RoundTrip(req)
	if err == nil || req.URL.Scheme != "https" || req.Context().Err() != nil || !Temporary(err) {
		return resp, err
	}
	again := req.Clone(req.Context())
	if req.Body != nil && req.Body != http.NoBody {
		if req.GetBody == nil {
			return nil, err
		}
		body, bodyErr := req.GetBody()
		if bodyErr != nil {
			return nil, errors.Join(err, bodyErr)
		}
		again.Body = body
	}
	return p.via.RoundTrip(again)
}

// proxiedBody notices when the proxy breaks off.
type proxiedBody struct {
	io.ReadCloser
	p      *proxied
	t      try
	ctx    context.Context // the request's, to tell a stall from a caller who left
	cancel context.CancelCauseFunc
}

func (b *proxiedBody) Read(buf []byte) (int, error) {
	n, err := b.ReadCloser.Read(buf)
	if err != nil && err != io.EOF {
		_, stalled := errors.AsType[stallError](context.Cause(b.ctx))
		if stalled || b.ctx.Err() == nil {
			b.t.around.Store(true)
			b.p.health.failed(err)
		}
	}
	return n, err
}

func (b *proxiedBody) Close() error {
	defer b.cancel(nil)
	return b.ReadCloser.Close()
}

// proxyError says that the proxy failed a request.
type proxyError struct {
	err     error
	refused bool // by its own decision
	down    bool // it was not reached
	final   bool // trying again is not wanted
}

func (e *proxyError) Error() string { return fmt.Sprintf("proxy: %v", e.err) }
func (e *proxyError) Unwrap() error { return e.err }

// temporary: a proxy comes back, unless it forbids.
func (e *proxyError) temporary() bool {
	if status, ok := errors.AsType[*StatusError](e.err); ok {
		return !e.final && status.temporary()
	}
	return true
}
