package registry

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/erofsd/erofsd/backend"
)

const (
	maxTokens   = 4096      // kept; they can be had again
	maxAnswer   = 128 << 10 // bytes of a token service's answer
	maxLifetime = 24 * time.Hour
)

// tokens are bearer tokens by what they were asked with, so that images that are read
// with the same login share them.
type tokens struct {
	// mu guards the fields below.
	mu    sync.Mutex
	known map[[sha256.Size]byte]token
	posts map[string]bool // token services, by realm, that know only POST
}

type token struct {
	value string
	until time.Time // zero: not said
}

// A tokenRequest is what a token is for.
type tokenRequest struct {
	realm, service, scope string
	cred                  auth.Credential
}

func newTokens() *tokens {
	return &tokens{known: make(map[[sha256.Size]byte]token), posts: make(map[string]bool)}
}

// key is a hash, so that no password is kept for its sake.
func (q tokenRequest) key() [sha256.Size]byte {
	p, err := json.Marshal([]string{q.realm, q.service, q.scope, q.cred.Username, q.cred.Password, q.cred.RefreshToken})
	if err != nil {
		panic("registry: internal error: " + err.Error())
	}
	return sha256.Sum256(p)
}

// get returns a token that is not refused.
func (t *tokens) get(ctx context.Context, d door, q tokenRequest, refused string) (string, time.Time, error) {
	key := q.key()
	t.mu.Lock()
	have := t.known[key]
	post := t.posts[q.realm]
	t.mu.Unlock()
	if have.value != "" && have.value != refused && (have.until.IsZero() || time.Now().Before(have.until)) {
		return have.value, have.until, nil
	}
	realm, err := checkRealm(ctx, q.realm, d.origin)
	if err != nil {
		return "", time.Time{}, err
	}
	got, err := t.fetch(ctx, d, q, realm, &post)
	if err != nil {
		return "", time.Time{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.known) >= maxTokens || len(t.posts) >= maxTokens {
		clear(t.known)
		clear(t.posts)
	}
	t.known[key] = got
	if post {
		t.posts[q.realm] = true
	}
	return got.value, got.until, nil
}

// fetch asks the token service: with GET, which the distribution specification wants,
// and when it does not know that with POST, as OAuth 2 does. post says which was right.
// An identity token can only be sent with POST.
func (t *tokens) fetch(ctx context.Context, d door, q tokenRequest, realm *url.URL, post *bool) (token, error) {
	if q.cred.RefreshToken != "" {
		return fetchToken(ctx, d, postToken(ctx, q, realm))
	}
	methods := []func(context.Context, tokenRequest, *url.URL) *http.Request{getToken, postToken}
	if *post {
		methods[0], methods[1] = methods[1], methods[0]
	}
	got, err := fetchToken(ctx, d, methods[0](ctx, q, realm))
	if !unknownMethod(err) {
		return got, err
	}
	got, second := fetchToken(ctx, d, methods[1](ctx, q, realm))
	if second != nil {
		return got, errors.Join(err, second)
	}
	*post = !*post
	return got, nil
}

// unknownMethod reports whether a token service may want to be asked in another way. A
// refusal is not that: a wrong password is not sent twice.
func unknownMethod(err error) bool {
	status, ok := errors.AsType[*backend.StatusError](err)
	if !ok {
		return false
	}
	switch status.Code {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone,
		http.StatusUnsupportedMediaType, http.StatusNotImplemented:
		return true
	}
	return false
}

func getToken(ctx context.Context, q tokenRequest, realm *url.URL) *http.Request {
	u := *realm
	query := u.Query()
	if q.service != "" {
		query.Set("service", q.service)
	}
	for _, s := range strings.Fields(q.scope) {
		query.Add("scope", s)
	}
	u.RawQuery = query.Encode()
	req := (&http.Request{Method: http.MethodGet, URL: &u, Host: u.Host, Header: http.Header{}}).WithContext(ctx)
	if q.cred.Username != "" || q.cred.Password != "" {
		req.SetBasicAuth(q.cred.Username, q.cred.Password)
	}
	return req
}

// postToken has the login in the form, as OAuth 2 wants it, and in the header, as services
// for nydusd know it.
func postToken(ctx context.Context, q tokenRequest, realm *url.URL) *http.Request {
	form := url.Values{"service": {q.service}, "client_id": {userAgent}}
	if q.scope != "" {
		form.Set("scope", q.scope)
	}
	switch {
	case q.cred.RefreshToken != "":
		form.Set("grant_type", "refresh_token")
		form.Set("refresh_token", q.cred.RefreshToken)
	case q.cred.Username != "":
		form.Set("grant_type", "password")
		form.Set("username", q.cred.Username)
		form.Set("password", q.cred.Password)
	}
	body := form.Encode()
	req := (&http.Request{
		Method: http.MethodPost, URL: realm, Host: realm.Host, ContentLength: int64(len(body)),
		Header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}},
		Body:   io.NopCloser(strings.NewReader(body)),
		GetBody: func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(body)), nil
		},
	}).WithContext(ctx)
	if q.cred.RefreshToken == "" && q.cred.Username != "" {
		req.SetBasicAuth(q.cred.Username, q.cred.Password)
	}
	return req
}

// fetchToken sends req, past a forward proxy, and reads the token. A redirect is followed
// only on the same host.
func fetchToken(ctx context.Context, d door, req *http.Request) (token, error) {
	client := *d.client
	client.CheckRedirect = func(next *http.Request, via []*http.Request) error {
		from := via[len(via)-1].URL
		next.Header.Del("Referer")
		switch {
		case len(via) >= 3:
			return errors.New("redirected more than 3 times")
		case !strings.EqualFold(next.URL.Hostname(), from.Hostname()) || next.URL.Scheme != "https" && !sameOrigin(next.URL, from):
			return errors.New("redirects to another host, which gets no login")
		}
		return nil
	}
	sent := time.Now()
	resp, err := client.Do(req.WithContext(backend.Private(ctx)))
	if err != nil {
		return token{}, fmt.Errorf("token service: %w", backend.RedactError(err))
	}
	defer discard(resp)
	if resp.StatusCode != http.StatusOK {
		return token{}, fmt.Errorf("token service: %w", backend.NewStatusError(resp))
	}
	p, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return token{}, fmt.Errorf("token service: %w", backend.RedactError(err))
	}
	return parseToken(p, sent)
}

// parseToken reads a token service's answer to a request that was sent at some time. Its
// error has nothing of p, which may be a token.
func parseToken(p []byte, sent time.Time) (token, error) {
	var answer struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"`
	}
	if json.Unmarshal(p, &answer) != nil {
		return token{}, errors.New("token service: the answer is not the JSON of a token")
	}
	t := token{value: answer.Token}
	if t.value == "" {
		t.value = answer.AccessToken
	}
	if t.value == "" || strings.ContainsFunc(t.value, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return token{}, errors.New("token service: the answer has no usable token")
	}
	if answer.ExpiresIn > 0 {
		lifetime := time.Duration(min(answer.ExpiresIn, maxLifetime.Seconds()) * float64(time.Second))
		t.until = sent.Add(lifetime - min(lifetime/10, 10*time.Second))
	}
	return t, nil
}

// checkRealm parses the address of a token service, which a registry chose. One inside of
// our network may be named only by a registry that is inside itself, and what answers
// there for cloud machines never: it would be asked on behalf of a stranger.
func checkRealm(ctx context.Context, realm string, registry *url.URL) (*url.URL, error) {
	u, err := url.Parse(realm)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return nil, errors.New("the registry names a malformed token service")
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("the registry names a token service that is reached by %q", u.Scheme)
	case u.Scheme == "http" && registry.Scheme == "https":
		return nil, errors.New("the registry, which is reached by https, names a token service without it")
	case strings.EqualFold(u.Hostname(), registry.Hostname()):
		return u, nil
	}
	there := reach(ctx, u.Hostname())
	if there == metadata || there != public && reach(ctx, registry.Hostname()) < there {
		return nil, fmt.Errorf("the registry names a token service, %s, at an internal address", u.Hostname())
	}
	return u, nil
}

// How far inside an address is.
const (
	public   = iota
	private  // of our network
	loopback // of this machine
	metadata // of the machine's owner
)

// carrier is where clouds have services, some of their metadata among them (RFC 6598).
var carrier = netip.MustParsePrefix("100.64.0.0/10")

// reach returns how far inside the address of host is that is most so. A name that is not
// known here counts as public: only a proxy may know it.
func reach(ctx context.Context, host string) int {
	var addrs []netip.Addr
	if a, err := netip.ParseAddr(host); err == nil {
		addrs = []netip.Addr{a}
	} else if addrs, err = net.DefaultResolver.LookupNetIP(ctx, "ip", host); err != nil {
		return public
	}
	most := public
	for _, a := range addrs {
		a = a.Unmap()
		switch {
		case a.IsLinkLocalUnicast(), a.IsMulticast(), a == netip.AddrFrom4([4]byte{100, 100, 100, 200}):
			most = max(most, metadata)
		case a.IsLoopback(), a.IsUnspecified():
			most = max(most, loopback)
		case a.IsPrivate(), carrier.Contains(a):
			most = max(most, private)
		}
	}
	return most
}

// sameOrigin reports whether a and b are the same scheme, host and port.
func sameOrigin(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && strings.EqualFold(a.Hostname(), b.Hostname()) && port(a) == port(b)
}

func port(u *url.URL) string {
	switch p := u.Port(); {
	case p != "":
		return p
	case u.Scheme == "https":
		return "443"
	}
	return "80"
}
