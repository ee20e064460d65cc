package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/httpproxy"
	"github.com/erofsd/erofsd/backend/localdisk"
	"github.com/erofsd/erofsd/backend/localfs"
	"github.com/erofsd/erofsd/backend/oss"
	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/backend/s3"
	"github.com/erofsd/erofsd/internal/config"
)

// build makes the store of b with its decorators. The closer, which may be nil, drops
// what is idle.
func (s *stores) build(b config.Backend) (backend.Store, io.Closer, error) {
	var c closingStore
	var h config.HTTP
	var err error
	switch {
	case b.Registry != nil:
		h = b.Registry.HTTP
		c, err = s.registryOf(*b.Registry)
	case b.S3 != nil:
		h = b.S3.HTTP
		c, err = s.s3Of(*b.S3)
	case b.OSS != nil:
		h = b.OSS.HTTP
		c, err = s.ossOf(*b.OSS)
	case b.HTTPProxy != nil:
		h = b.HTTPProxy.HTTP
		c, err = s.httpProxyOf(*b.HTTPProxy)
	case b.LocalFS != nil:
		l := *b.LocalFS
		d, err := localfs.NewOptions(localfs.Options{BlobFile: l.BlobFile, Dir: l.Dir, AltDirs: l.AltDirs})
		if err != nil {
			return noStore{err}, nil, nil // it may come later; a complete cache needs none
		}
		return backend.Metrics(d, s.reg, b.Type), nil, nil
	case b.LocalDisk != nil:
		d, err := localdisk.New(localdisk.Options{Device: b.LocalDisk.Device, DisableGPT: b.LocalDisk.DisableGPT})
		if err != nil {
			return nil, nil, err
		}
		return backend.Metrics(d, s.reg, b.Type), nil, nil
	default:
		return nil, nil, errors.New("there is none in the configuration")
	}
	if err != nil {
		return nil, nil, err
	}
	return s.decorate(c, retryOf(h), b.Type), c, nil
}

// mirrored reports whether reads of b may be answered by others than the origin: by
// mirrors, or a proxy that can be gone around.
func mirrored(b config.Backend) bool {
	others := func(h config.HTTP) bool { return len(h.Mirrors) > 0 || h.Proxy.URL != "" && h.Proxy.Fallback }
	switch {
	case b.Registry != nil:
		return others(b.Registry.HTTP) || b.Registry.HostsDir != ""
	case b.S3 != nil:
		return others(b.S3.HTTP)
	case b.OSS != nil:
		return others(b.OSS.HTTP)
	case b.HTTPProxy != nil:
		return others(b.HTTPProxy.HTTP)
	}
	return false
}

// A closingStore has connections.
type closingStore interface {
	backend.Store
	io.Closer
}

// retryOf says how often reads are tried. As with nydusd, 0 leaves it to us.
func retryOf(h config.HTTP) backend.RetryPolicy {
	if h.RetryLimit == nil || *h.RetryLimit <= 0 {
		return backend.RetryPolicy{}
	}
	return backend.RetryPolicy{Attempts: *h.RetryLimit + 1}
}

func headers(m map[string]config.Secret) http.Header {
	h := http.Header{}
	for name, v := range m {
		h.Set(name, v.Reveal())
	}
	return h
}

// options of the connections that h says. Like nydusd's they take no proxy from the
// environment.
func (s *stores) options(h config.HTTP) (backend.HTTPOptions, error) {
	o := backend.HTTPOptions{
		CAFiles: h.CAFiles, SkipVerify: h.SkipVerify, ClientCert: h.ClientCert, ClientKey: h.ClientKey,
		ConnectTimeout: time.Duration(h.ConnectTimeout), Header: headers(h.Headers), NoEnvironmentProxy: true, Logger: s.log,
	}
	p := h.Proxy
	if p.URL == "" {
		return o, nil
	}
	u, err := url.Parse(p.URL)
	if err != nil {
		return o, errors.New("proxy.url is no URL")
	}
	if user, password, ok := strings.Cut(p.Login.Reveal(), ":"); ok {
		u.User = url.UserPassword(user, password)
	}
	o.Proxy = backend.ProxyOptions{
		URL: u.String(), PingURL: p.PingURL, Fallback: p.Fallback, LastTryDirect: true, CheckInterval: time.Duration(p.CheckInterval),
		CheckPause: time.Duration(p.CheckPause), Timeout: time.Duration(h.Timeout), UseHTTP: p.UseHTTP,
	}
	return o, nil
}

func (s *stores) registryOf(r config.Registry) (closingStore, error) {
	h, err := s.options(r.HTTP)
	if err != nil {
		return nil, err
	}
	o := registry.Options{
		Scheme: r.Scheme, HTTP: h, BlobURLScheme: r.BlobURLScheme, BlobRedirectedHost: r.BlobRedirectedHost,
		HostsDir: r.HostsDir, Stall: time.Duration(r.Timeout), Logger: s.log,
	}
	if r.Credentials == config.CredentialsDocker {
		o.Credential = registry.DockerCredentials()
	}
	if auth := r.Auth.Reveal(); auth != "" {
		if o.Credential, err = registry.StaticCredential(r.Host, auth); err != nil {
			return nil, err
		}
	}
	if token := r.Token.Reveal(); token != "" {
		o.Credential = registry.TokenCredential(r.Host, token, o.Credential)
	}
	for _, m := range r.Mirrors {
		o.Mirrors = append(o.Mirrors, registry.MirrorHost{
			Host: m.Host, Header: headers(m.Headers), PingURL: m.PingURL, AuthThrough: m.AuthThrough,
			CheckInterval: time.Duration(m.CheckInterval), CheckPause: time.Duration(m.CheckPause), FailureLimit: m.FailureLimit,
		})
	}
	return registry.New(o)
}

func (s *stores) s3Of(c config.S3) (closingStore, error) {
	h, err := s.options(c.HTTP)
	if err != nil {
		return nil, err
	}
	o := s3.Options{
		Endpoint: c.Endpoint, Scheme: c.Scheme, Region: c.Region, Bucket: c.Bucket, Prefix: c.Prefix,
		AccessKeyID: c.AccessKeyID, AccessKeySecret: c.AccessKeySecret.Reveal(), HTTP: h, Stall: time.Duration(c.Timeout),
	}
	return s.withMirrors(c.Mirrors, func(m *at) (closingStore, error) {
		o := o
		if m != nil {
			o.Scheme, o.Endpoint, o.HTTP.Header = m.scheme, m.host, m.header
		}
		return s3.New(o)
	})
}

func (s *stores) ossOf(c config.OSS) (closingStore, error) {
	h, err := s.options(c.HTTP)
	if err != nil {
		return nil, err
	}
	o := oss.Options{
		Endpoint: c.Endpoint, Scheme: c.Scheme, Bucket: c.Bucket, Prefix: c.Prefix,
		AccessKeyID: c.AccessKeyID, AccessKeySecret: c.AccessKeySecret.Reveal(), HTTP: h, Stall: time.Duration(c.Timeout),
	}
	return s.withMirrors(c.Mirrors, func(m *at) (closingStore, error) {
		o := o
		if m != nil {
			o.Scheme, o.Endpoint, o.HTTP.Header = m.scheme, m.host, m.header
		}
		return oss.New(o)
	})
}

func (s *stores) httpProxyOf(c config.HTTPProxy) (closingStore, error) {
	h, err := s.options(c.HTTP)
	if err != nil {
		return nil, err
	}
	o := httpproxy.Options{Addr: c.Addr, Path: c.Path, HTTP: h, Stall: time.Duration(c.Timeout)}
	return s.withMirrors(c.Mirrors, func(m *at) (closingStore, error) {
		o := o
		if m != nil {
			o.Addr, o.HTTP.Header = m.scheme+"://"+m.host, m.header
		}
		return httpproxy.New(o)
	})
}

// at is where a mirror is.
type at struct {
	scheme, host string
	header       http.Header
}

// mirroredStore is a store that is asked after its mirrors.
type mirroredStore struct {
	*backend.Mirrored
	all []closingStore
}

func (m *mirroredStore) Close() error {
	var errs []error
	for _, s := range m.all {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, m.Mirrored.Close())...)
}

// withMirrors makes the store that open opens, with nil, and its mirrors before it.
func (s *stores) withMirrors(mirrors []config.Mirror, open func(*at) (closingStore, error)) (closingStore, error) {
	primary, err := open(nil)
	if err != nil || len(mirrors) == 0 {
		return primary, err
	}
	all := []closingStore{primary}
	var list []backend.MirrorStore
	for _, m := range mirrors {
		scheme, host, ok := strings.Cut(m.Host, "://")
		if !ok {
			scheme, host = "https", m.Host
		}
		header := headers(m.Headers)
		store, err := open(&at{scheme, host, header})
		if err != nil {
			return nil, fmt.Errorf("mirror %s: %w", m.Host, err)
		}
		all = append(all, store)
		ping, err := backend.NewHTTPClient(backend.HTTPOptions{NoEnvironmentProxy: true})
		if err != nil {
			return nil, err
		}
		list = append(list, backend.MirrorStore{
			Store: store, Name: m.Host, Ping: backend.Ping(ping, cmp.Or(m.PingURL, scheme+"://"+host+"/"), header),
			CheckInterval: time.Duration(m.CheckInterval), CheckPause: time.Duration(m.CheckPause), FailureLimit: m.FailureLimit,
		})
	}
	return &mirroredStore{backend.Mirror(primary, s.log, list...), all}, nil
}
