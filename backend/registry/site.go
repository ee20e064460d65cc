package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/erofsd/erofsd/backend"
)

// A site is one server at which a registry's content can be had: the registry itself or a
// mirror. It is safe for concurrent use.
type site struct {
	scheme string // https or http
	detect bool   // http is tried when the site does not speak TLS
	plain  atomic.Bool
	host   string
	prefix string // of paths: /v2, unless a mirror is elsewhere
	query  string // of all requests to it
	client *http.Client
	header http.Header // of requests to it, not of those that it redirects
	login  string      // whose credential it gets: a host
	auth   *site       // where logins are got; nil: here
	rewrite
	stall time.Duration
	log   *slog.Logger
}

// rewrite changes where redirects lead.
type rewrite struct{ scheme2, host2 string }

// url is an address of the distribution API.
func (s *site) url(repository, kind, name string) *url.URL {
	u := s.base()
	u.Path += "/" + repository + "/" + kind + "/" + name
	return u
}

// base is where the API is.
func (s *site) base() *url.URL {
	u := &url.URL{Scheme: s.scheme, Host: s.host, Path: s.prefix, RawQuery: s.query}
	if s.plain.Load() {
		u.Scheme = "http"
	}
	return u
}

// root is the address that says whether the API is there.
func (s *site) root() *url.URL {
	u := s.base()
	u.Path += "/"
	return u
}

// ping asks whether the site is there; any answer below 500 will do.
func (s *site) ping(at string) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		to := at
		if to == "" {
			to = s.root().String()
		}
		return backend.Ping(s.client, to, s.header)(ctx)
	}
}

// door is where and for whom logins are got.
func (s *site) door() door {
	return door{client: s.client, origin: s.base(), host: s.login, limit: s.stall}
}

// do sends a request to the site as the login of its context, whose scopes are set. It
// follows no redirect of a GET.
func (s *site) do(req *http.Request) (*http.Response, error) {
	d := s.door()
	if s.auth != nil {
		// The origin's token goes to the mirror, which was told to be trusted with it.
		d = s.auth.door()
		d.ask = s.auth.challenge
	}
	return loginOf(req.Context()).do(req, s.send, d)
}

// challenge asks the site what login it wants.
func (s *site) challenge(ctx context.Context) (challenge, error) {
	u := s.root()
	resp, err := s.send((&http.Request{Method: http.MethodGet, URL: u, Host: u.Host, Header: http.Header{}}).WithContext(ctx))
	if err != nil {
		return challenge{}, err
	}
	defer discard(resp)
	if resp.StatusCode != http.StatusUnauthorized {
		return challenge{}, nil
	}
	return parseChallenge(resp.Header.Values("WWW-Authenticate")), nil
}

// send sends one request, without TLS where that is allowed and all there is.
func (s *site) send(req *http.Request) (*http.Response, error) {
	for k, v := range s.header {
		if _, there := req.Header[k]; !there {
			req.Header[k] = v
		}
	}
	if s.plain.Load() && req.URL.Scheme == "https" {
		req = s.withoutTLS(req)
	}
	client := *s.client
	if req.Method == http.MethodGet {
		client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	}
	resp, err := client.Do(req)
	if err == nil || !s.detect || req.URL.Scheme != "https" || req.Context().Err() != nil || !noTLS(err) {
		return resp, err
	}
	again, plainErr := client.Do(s.withoutTLS(req))
	if plainErr != nil {
		return nil, err
	}
	if redirects(again) && strings.HasPrefix(again.Header.Get("Location"), "https:") {
		discard(again) // it does speak TLS, if not just now
		return nil, err
	}
	if !s.plain.Swap(true) {
		s.log.Warn("registry does not speak TLS, reading without", "host", s.host)
	}
	return again, nil
}

func (s *site) withoutTLS(req *http.Request) *http.Request {
	req = req.Clone(req.Context())
	req.URL.Scheme = "http"
	return req
}

// noTLS reports whether err says that nobody speaks TLS at an address.
func noTLS(err error) bool {
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	return errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, syscall.ECONNREFUSED)
}

// storage is where a registry keeps a blob's bytes.
type storage struct {
	url   *url.URL
	until time.Time // not to be used later; zero: until it is refused
}

// maxHops bounds a chain of redirects.
const maxHops = 10

// get gets u, which is at the site or where it sent us, for repository repo, and follows
// redirects. Credentials go to the site alone. at is where the answer came from, nil when
// that is u.
func (s *site) get(ctx context.Context, repo string, u *url.URL, header http.Header) (resp *http.Response, at *storage, err error) {
	ctx = auth.AppendRepositoryScope(ctx, registry.Reference{Registry: s.login, Repository: repo}, auth.ActionPull)
	for hops := 0; ; hops++ {
		resp, err = s.getOnce(ctx, u, header.Clone())
		if err != nil || !redirects(resp) {
			return resp, at, err
		}
		now := time.Now()
		next, err := s.next(u, resp.Header.Get("Location"))
		discard(resp)
		switch {
		case err != nil:
			return nil, nil, err
		case hops == maxHops:
			return nil, nil, fmt.Errorf("redirected more than %d times", maxHops)
		}
		hop := expiry(next, resp.Header, now)
		if at != nil && !at.until.IsZero() && (hop.IsZero() || at.until.Before(hop)) {
			hop = at.until
		}
		u, at = next, &storage{next, hop}
	}
}

func (s *site) getOnce(ctx context.Context, u *url.URL, header http.Header) (*http.Response, error) {
	req := (&http.Request{Method: http.MethodGet, URL: u, Host: u.Host, Header: header}).WithContext(ctx)
	req.Header.Set("Accept-Encoding", "identity")
	if s.own(u) {
		return s.do(req)
	}
	client := *s.client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return client.Do(req)
}

// own reports whether u is the site's. It stays so when the site turned out not to speak TLS
// after u was made; send sees to that.
func (s *site) own(u *url.URL) bool {
	base := s.base()
	if s.plain.Load() && u.Scheme == "https" {
		base.Scheme = "https"
	}
	return sameOrigin(u, base)
}

func redirects(resp *http.Response) bool {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return resp.Header.Get("Location") != ""
	}
	return false
}

// next resolves a Location, and rewrites it as the options want. Its errors have nothing of
// it, as it may be signed.
func (s *site) next(from *url.URL, location string) (*url.URL, error) {
	u, err := from.Parse(location)
	if err != nil {
		return nil, errors.New("redirected to a malformed address")
	}
	away := !s.own(u)
	if away && s.scheme2 != "" {
		u.Scheme = s.scheme2
	}
	if away && s.host2 != "" {
		u.Host = s.host2
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, errors.New("redirected to an address that is neither https nor http")
	case u.Scheme == "http" && from.Scheme == "https" && s.scheme2 != "http" && !s.detect:
		return nil, errors.New("redirected from https to http, which is not protected")
	}
	return u, nil
}
