package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/erofsd/erofsd/backend"
)

// newTransport prefers HTTP/1.1: parallel ranges go over parallel connections,
// so that one lost packet or one slow flow-control window does not hold up all.
func newTransport(caFile string) (*http.Transport, error) {
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    10 * time.Second,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // a range is of the stored bytes
		Protocols:              new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	if caFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("read CA file: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("read the system's CA certificates: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read CA file: %s holds no PEM certificate", caFile)
	}
	t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	return t, nil
}

// checkRedirect guards every redirect. The auth client takes the credential off
// when one leaves the registry's origin; the referrer could be a signed URL.
func checkRedirect(req *http.Request, via []*http.Request) error {
	req.Header.Del("Referer")
	if len(via) >= 10 {
		return errors.New("redirected more than 10 times")
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return errors.New("redirected from https to " + req.URL.Scheme + ", which is not protected")
	}
	return nil
}

// minProgress is how many bytes count as progress. A server that drips slower
// than this per Options.Stall is as good as dead.
const minProgress = 4 << 10

// A watch ends a request that makes no progress.
type watch struct {
	ctx    context.Context // the request's
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
	got    int // bytes since the timer was set
}

func newWatch(ctx context.Context, stall time.Duration) *watch {
	w := &watch{stall: stall}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.timer = time.AfterFunc(stall, func() { w.cancel(stallError(stall)) })
	return w
}

// progress counts n bytes that went over the network.
func (w *watch) progress(n int) {
	if w.got += n; w.got >= minProgress {
		w.got = 0
		w.timer.Reset(w.stall)
	}
}

func (w *watch) stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// reader counts what is read from r.
func (w *watch) reader(r io.Reader) io.Reader { return &watchedReader{r, w} }

type watchedReader struct {
	r io.Reader
	w *watch
}

func (r *watchedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.w.progress(n)
	return n, err
}

// fail turns an error of the network or of oras into ours: typed where callers
// branch, without secrets, and with the reason when the watch ended the request.
func (w *watch) fail(err error) error {
	if err == nil {
		return nil
	}
	if stalled, ok := errors.AsType[stallError](context.Cause(w.ctx)); ok {
		return stalled
	}
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if _, ok := errors.AsType[*backend.StatusError](err); ok {
		return err
	}
	if e, ok := errors.AsType[*errcode.ErrorResponse](err); ok {
		status := &backend.StatusError{Code: e.StatusCode, URL: backend.RedactURL(e.URL.String())}
		if len(e.Errors) > 0 && isErrorCode(e.Errors[0].Code) {
			status.Reason = e.Errors[0].Code
		}
		return status
	}
	switch {
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		return fmt.Errorf("the registry wants a login and there is none for it: %w", fs.ErrPermission)
	case errors.Is(err, errdef.ErrNotFound):
		return fmt.Errorf("%w: %w", backend.RedactError(err), fs.ErrNotExist)
	}
	return backend.RedactError(err)
}

// isErrorCode reports whether s looks like a code of the distribution
// specification. What else a server says may echo what it was sent.
func isErrorCode(s string) bool {
	for _, c := range s {
		if c != '_' && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return len(s) <= 40
}

// stallError says that a request made no progress for so long.
type stallError time.Duration

func (e stallError) Error() string { return "no progress for " + time.Duration(e).String() }
func (e stallError) Timeout() bool { return true }
