package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// A CredentialFunc gives the login for a registry (host or host:port). An empty
// credential means an anonymous read.
type CredentialFunc = func(ctx context.Context, host string) (auth.Credential, error)

// maxGrants bounds how many grants a login keeps; they can be had again.
const maxGrants = 4096

// A login is one identity at registries: it answers their challenges and keeps what they
// granted until it expires or is refused.
type login struct {
	credential CredentialFunc // nil: anonymous
	tokens     *tokens        // shared by logins

	// mu guards grants.
	mu     sync.Mutex
	grants map[grantKey]*grant
}

// grantKey says for what a grant is: repositories have tokens of their own.
type grantKey struct{ host, scope string }

func newLogin(c CredentialFunc, t *tokens) *login {
	return &login{credential: c, tokens: t, grants: make(map[grantKey]*grant)}
}

type loginKey struct{}

// with returns a context whose requests are made as l.
func (l *login) with(ctx context.Context) context.Context {
	return context.WithValue(ctx, loginKey{}, l)
}

func loginOf(ctx context.Context) *login { return ctx.Value(loginKey{}).(*login) }

// A grant is what a registry lets a login do, renewed by one request for all who wait.
type grant struct {
	// mu guards the fields below.
	mu        sync.Mutex
	state     granted
	challenge challenge // by which state was got
	spent     string    // a given token that was refused, as a header
	flight    *flight   // renewal under way; nil: none
}

// granted is what a renewal gives.
type granted struct {
	header string    // of Authorization; "": none yet
	until  time.Time // zero: until it is refused
	given  bool      // it is a token out of the configuration; there may be more
}

// A flight is a renewal that several wait for; it ends when the last of them leaves.
type flight struct {
	done    chan struct{}
	cancel  context.CancelFunc
	waiters int // guarded by the grant's mu
	state   granted
	err     error
}

func (l *login) grant(k grantKey) *grant {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.grants[k]
	if g == nil {
		if len(l.grants) >= maxGrants {
			clear(l.grants)
		}
		g = new(grant)
		l.grants[k] = g
	}
	return g
}

// current returns the header in use, and whether it is known to have expired.
func (g *grant) current() (header string, c challenge, expired bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	until := g.state.until
	return g.state.header, g.challenge, !until.IsZero() && time.Now().After(until)
}

// A door is where a registry is asked for a login, and on whose behalf.
type door struct {
	client *http.Client
	origin *url.URL      // the registry that challenged
	host   string        // whose credential to use
	limit  time.Duration // of a token request
	// ask, when not nil, gets the challenge to answer instead of the one that came.
	ask func(ctx context.Context) (challenge, error)
}

// challenge returns what is to be answered when c came.
func (d door) challenge(ctx context.Context, c challenge) (challenge, error) {
	if d.ask == nil {
		return c, nil
	}
	asked, err := d.ask(ctx)
	if err != nil || asked.scheme == "" {
		return c, err
	}
	return asked, nil
}

// renew returns a header other than refused, got by answering c. All callers at the
// same time share one answer.
func (l *login) renew(ctx context.Context, g *grant, d door, scopes []string, refused string, c challenge) (granted, error) {
	g.mu.Lock()
	if g.state.header != refused && g.state.header != "" {
		defer g.mu.Unlock()
		return g.state, nil // somebody was faster
	}
	if g.state.given {
		g.spent = refused
	}
	f := g.flight
	if f == nil {
		// Its own context: the one who came first may leave first.
		own, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.limit)
		f = &flight{done: make(chan struct{}), cancel: cancel}
		g.flight = f
		go l.fly(own, g, f, d, scopes, refused, g.spent, c)
	}
	f.waiters++
	g.mu.Unlock()
	select {
	case <-f.done:
		return f.state, f.err
	case <-ctx.Done():
		g.mu.Lock()
		defer g.mu.Unlock()
		if f.waiters--; f.waiters == 0 {
			f.cancel()
			if g.flight == f {
				g.flight = nil
			}
		}
		return granted{}, ctx.Err()
	}
}

func (l *login) fly(ctx context.Context, g *grant, f *flight, d door, scopes []string, refused, spent string, c challenge) {
	defer f.cancel()
	var state granted
	c, err := d.challenge(ctx, c)
	if err == nil {
		state, err = l.answer(ctx, d, withHint(scopes, c.scope), refused, spent, c)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if f.state, f.err = state, err; err == nil {
		g.state, g.challenge = state, c
	}
	if g.flight == f {
		g.flight = nil
	}
	close(f.done)
}

// answer makes the header that c asks for.
func (l *login) answer(ctx context.Context, d door, scopes []string, refused, spent string, c challenge) (granted, error) {
	var cred auth.Credential
	if l.credential != nil {
		var err error
		if cred, err = l.credential(ctx, d.host); err != nil {
			return granted{}, err
		}
	}
	if cred.AccessToken != "" {
		if header := "Bearer " + cred.AccessToken; header != spent {
			return granted{header: header, given: true}, nil
		}
		if cred.AccessToken = ""; cred == auth.EmptyCredential {
			return granted{}, fmt.Errorf("the registry refuses the token for %s: %w", d.host, fs.ErrPermission)
		}
	}
	if c.scheme == "bearer" {
		q := tokenRequest{c.realm, c.service, strings.Join(scopes, " "), cred}
		token, until, err := l.tokens.get(ctx, d, q, strings.TrimPrefix(refused, "Bearer "))
		return granted{header: "Bearer " + token, until: until}, err
	}
	switch {
	case cred.Username == "" || cred.Password == "":
		return granted{}, fmt.Errorf("the registry answered 401, it wants a login and there is none for it: %w", fs.ErrPermission)
	case c.scheme != "basic":
		return granted{}, fmt.Errorf("the registry refuses and does not say what login it wants: %w", fs.ErrPermission)
	}
	return granted{header: "Basic " + base64.StdEncoding.EncodeToString([]byte(cred.Username+":"+cred.Password))}, nil
}

// do sends req, whose context says the scopes, with the grant for it, and answers a
// challenge: once, and again when a given token was refused and there is another way.
func (l *login) do(req *http.Request, send func(*http.Request) (*http.Response, error), d door) (*http.Response, error) {
	if req.Header.Get("Authorization") != "" {
		return send(req)
	}
	ctx := req.Context()
	scopes := auth.GetAllScopesForHost(ctx, d.host)
	g := l.grant(grantKey{d.host, strings.Join(scopes, " ")})
	header, c, expired := g.current()
	if expired {
		renewed, err := l.renew(ctx, g, d, scopes, header, c)
		if err != nil {
			return nil, fmt.Errorf("renew login: %w", err)
		}
		header = renewed.header
	}
	given := false // header was, and is not what a token service granted just now
	for attempt := 0; ; attempt++ {
		resp, err := send(authorized(req, header))
		if err != nil || resp.StatusCode != http.StatusUnauthorized || attempt == 2 {
			return resp, err
		}
		c = parseChallenge(resp.Header.Values("WWW-Authenticate"))
		if c.scheme == "" && l.credential == nil && d.ask == nil {
			return resp, nil // nothing to answer with
		}
		if attempt == 1 && !given {
			return resp, nil // what was got just now is refused
		}
		discard(resp)
		renewed, err := l.renew(ctx, g, d, scopes, header, c)
		if err != nil {
			return nil, fmt.Errorf("log in: %w", err)
		}
		header, given = renewed.header, renewed.given
		if req, err = rewound(req); err != nil {
			return nil, err
		}
	}
}

// rewound returns req with its body from the start.
func rewound(req *http.Request) (*http.Request, error) {
	if req.Body == nil || req.Body == http.NoBody {
		return req, nil
	}
	if req.GetBody == nil {
		return nil, errors.New("log in: the upload cannot be sent again")
	}
	body, err := req.GetBody()
	if err != nil {
		return nil, err
	}
	req = req.Clone(req.Context())
	req.Body = body
	return req, nil
}

// withHint adds the scope that a challenge asks for.
func withHint(scopes []string, hint string) []string {
	if hint == "" {
		return scopes
	}
	return auth.CleanScopes(append(strings.Split(hint, " "), scopes...))
}

func authorized(req *http.Request, header string) *http.Request {
	req = req.Clone(req.Context())
	if header != "" {
		req.Header.Set("Authorization", header)
	}
	return req
}

// discard gives a connection back, if the body is short.
func discard(resp *http.Response) {
	io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
}
