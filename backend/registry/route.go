package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"oras.land/oras-go/v2/registry"

	"github.com/erofsd/erofsd/backend"
)

// A MirrorHost is a mirror of the registries that a store reads, as nydusd's configuration
// describes it.
type MirrorHost struct {
	// Host is http://host:port or https://host:port; without a scheme it is https.
	Host string
	// Header is added to requests to the mirror.
	Header http.Header
	// PingURL is asked whether the mirror is well. "": Host with /v2/.
	PingURL string
	// AuthThrough gets logins by way of the mirror. Without it they are got from the
	// registry, and the mirror gets what the registry granted.
	AuthThrough bool
	// CheckInterval, CheckPause and FailureLimit are those of backend.MirrorStore.
	CheckInterval, CheckPause time.Duration
	FailureLimit              int
}

// A route is how one registry is read.
type route struct {
	stamp   string // of the file that says so
	origin  *site
	mirrors []*site
	resolve []*site // mirrors that may say what a tag means
	blobs   backend.Store
	close   func() error // ends pings; nil: there are none
}

// route returns how to read registry host, as it is known or configured by now.
func (s *Store) route(host string) (*route, error) {
	dir, stamp, err := s.hostsStamp(host)
	if err != nil {
		return nil, err
	}
	s.core.mu.Lock()
	r := s.core.routes[host]
	s.core.mu.Unlock()
	if r != nil && r.stamp == stamp {
		return r, nil
	}
	made, err := s.core.newRoute(host, dir)
	if err != nil {
		return nil, fmt.Errorf("registry %s: %w", host, err)
	}
	made.stamp = stamp
	s.core.mu.Lock()
	old := s.core.routes[host]
	if old != r {
		old, made = made, old // somebody was faster
	} else {
		s.core.routes[host] = made
	}
	s.core.mu.Unlock()
	if old != nil && old.close != nil {
		old.close()
	}
	return made, nil
}

// hostsStamp returns the directory with the configuration of host and what changes with
// it; both are empty when there is none.
func (s *Store) hostsStamp(host string) (dir, stamp string, err error) {
	if s.core.o.HostsDir == "" {
		return "", "", nil
	}
	if dir, err = hostDir(s.core.o.HostsDir, host); err != nil || dir == "" {
		return "", "", err
	}
	st, err := os.Stat(filepath.Join(dir, "hosts.toml"))
	if err != nil {
		return dir, dir, nil
	}
	return dir, fmt.Sprint(dir, st.ModTime().UnixNano(), st.Size()), nil
}

func (c *core) newRoute(host, dir string) (*route, error) {
	address := registry.Reference{Registry: host}.Host() // docker.io is elsewhere
	origin := c.site(address)
	r := &route{origin: origin}
	var mirrors []backend.MirrorStore
	for _, m := range c.o.Mirrors {
		site, err := c.nydusMirror(origin, m)
		if err != nil {
			return nil, err
		}
		r.mirrors = append(r.mirrors, site)
		mirrors = append(mirrors, backend.MirrorStore{
			Store: siteStore{site}, Name: site.host, Ping: site.ping(m.PingURL),
			CheckInterval: m.CheckInterval, CheckPause: m.CheckPause, FailureLimit: m.FailureLimit,
		})
	}
	r.resolve = r.mirrors
	if dir != "" {
		server, places, err := readHosts(dir)
		if err != nil {
			return nil, err
		}
		if server.host == "" {
			server.scheme, server.host = origin.scheme, address
		}
		if r.origin, err = c.placeSite(server, origin.detect && server.scheme == origin.scheme, ""); err != nil {
			return nil, err
		}
		for _, p := range places {
			site, err := c.placeSite(p, false, host)
			if err != nil {
				return nil, err
			}
			if p.resolve && p.pull {
				r.resolve = append(slices.Clip(r.resolve), site)
			}
			if p.pull {
				r.mirrors = append(r.mirrors, site)
				mirrors = append(mirrors, backend.MirrorStore{Store: siteStore{site}, Name: site.host, Ping: site.ping("")})
			}
		}
	}
	r.blobs = siteStore{r.origin}
	if len(mirrors) > 0 {
		m := backend.Mirror(r.blobs, c.log, mirrors...)
		r.blobs, r.close = m, m.Close
	}
	return r, nil
}

// site is the registry at host as the options describe it.
func (c *core) site(host string) *site {
	return &site{
		scheme: c.scheme, detect: c.detect, host: host, prefix: "/v2", client: c.client, login: host,
		rewrite: rewrite{c.o.BlobURLScheme, c.o.BlobRedirectedHost}, stall: c.o.Stall, log: c.log,
	}
}

// nydusMirror is a mirror of nydusd's configuration.
func (c *core) nydusMirror(origin *site, m MirrorHost) (*site, error) {
	scheme, host, prefix, err := splitHost(m.Host, false)
	if err != nil || host == "" {
		return nil, fmt.Errorf("mirror %q: not of the form https://host:port", backend.RedactURL(m.Host))
	}
	if u, err := url.Parse(m.PingURL); m.PingURL != "" && (err != nil || u.Host == "") {
		return nil, fmt.Errorf("mirror %s: its ping URL is malformed", host)
	}
	s := c.site(host)
	s.scheme, s.detect, s.prefix, s.header, s.login = scheme, false, prefix, canonical(m.Header), origin.login
	if !m.AuthThrough {
		s.auth = origin
	}
	return s, nil
}

// placeSite is a place of a hosts.toml; namespace is the registry that it is a mirror of.
func (c *core) placeSite(p hostPlace, detect bool, namespace string) (*site, error) {
	s := c.site(p.host)
	s.scheme, s.detect, s.prefix, s.header = p.scheme, detect, p.prefix, canonical(p.header)
	if namespace != "" && namespace != p.host {
		s.query = url.Values{"ns": {namespace}}.Encode()
	}
	o := c.o.HTTP
	o.CAFiles = append(slices.Clip(o.CAFiles), p.http.CAFiles...)
	o.SkipVerify = o.SkipVerify || p.http.SkipVerify
	if p.http.ClientCert != "" {
		o.ClientCert, o.ClientKey = p.http.ClientCert, p.http.ClientKey
	}
	if p.http.ConnectTimeout > 0 {
		o.ConnectTimeout = p.http.ConnectTimeout
	}
	var err error
	s.client, err = c.clientFor(o)
	return s, err
}

// clientFor returns the client with options o, which differ from the store's in TLS and the
// connect timeout alone, so that sites share connections where they can.
func (c *core) clientFor(o backend.HTTPOptions) (*http.Client, error) {
	key := strings.Join([]string{
		strings.Join(o.CAFiles, "\x00"), fmt.Sprint(o.SkipVerify), o.ClientCert, o.ClientKey, o.ConnectTimeout.String(),
	}, "\x00\x00")
	c.mu.Lock()
	known := c.clients[key]
	c.mu.Unlock()
	if known != nil {
		return known, nil
	}
	made, err := backend.NewHTTPClient(o)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if known = c.clients[key]; known == nil {
		c.clients[key], known = made, made
	}
	return known, nil
}

func canonical(h http.Header) http.Header {
	out := make(http.Header, len(h))
	for k, v := range h {
		out[http.CanonicalHeaderKey(k)] = v
	}
	return out
}

// siteStore reads blobs at one site.
type siteStore struct{ site *site }

func (s siteStore) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	b, err := s.open(ctx, ref)
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (s siteStore) open(ctx context.Context, ref backend.Ref) (*blob, error) {
	if err := errors.Join(ctx.Err(), ref.Digest.Validate()); err != nil {
		return nil, err
	}
	b := &blob{site: s.site, ref: ref, size: ref.Size}
	var err error
	if ref.Size == 0 {
		b.size, err = b.learnSize(ctx)
	}
	return b, err
}
