package backend

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"time"
)

// HTTPOptions are what all stores that speak HTTP share; the zero value is TLS with
// the system's certificate authorities.
type HTTPOptions struct {
	// CAFiles are PEM files of certificate authorities to trust besides the system's;
	// an empty name is none.
	CAFiles []string
	// ConnectTimeout bounds making a connection, and the TLS handshake on it. 0: 10 s.
	ConnectTimeout time.Duration
}

// NewHTTPClient returns a client for ranges of blobs. It makes no request. It prefers
// HTTP/1.1: parallel ranges go over parallel connections, so that one lost packet or one
// slow flow-control window does not hold up all.
func NewHTTPClient(o HTTPOptions) (*http.Client, error) {
	set(&o.ConnectTimeout, 10*time.Second)
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: o.ConnectTimeout, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    o.ConnectTimeout,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // a range is of the stored bytes
		Protocols:              new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	var err error
	if t.TLSClientConfig, err = newTLSConfig(o); err != nil {
		return nil, err
	}
	return &http.Client{Transport: t, CheckRedirect: checkRedirect}, nil
}

// newTLSConfig returns nil when the defaults do.
func newTLSConfig(o HTTPOptions) (*tls.Config, error) {
	files := slices.DeleteFunc(slices.Clone(o.CAFiles), func(name string) bool { return name == "" })
	if len(files) == 0 {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("read the system's CA certificates: %w", err)
	}
	for _, name := range files {
		pem, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read CA file: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA file: %s holds no PEM certificate", name)
		}
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// checkRedirect guards every redirect. The referrer could be a signed URL.
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
