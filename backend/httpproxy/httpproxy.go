package httpproxy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/object"
)

// Options are the choices of a [Store].
type Options struct {
	// Addr is http://host, https://host, with a port if need be, or the absolute path of
	// a unix socket. Required. A path in it comes before Path.
	Addr string
	// Path is where the blobs are below Addr. "": at its root.
	Path string
	// HTTP is how connections are made.
	HTTP backend.HTTPOptions
	// Stall is how long a request may go without progress (less than 4 KiB, or
	// no answer) before it is given up. 0: 30 s.
	Stall time.Duration
}

// A Store is a [backend.Store] over one server. It keeps connections between calls and is
// safe for concurrent use.
type Store struct {
	objects object.Store
	base    *url.URL
	client  *http.Client
}

// New returns a store. It makes no request.
func New(o Options) (*Store, error) {
	s := &Store{}
	s.objects = object.Store{Get: s.get, Stall: o.Stall, Untagged: true}
	var err error
	if strings.HasPrefix(o.Addr, "/") {
		o.HTTP.Socket = o.Addr
		s.base = &url.URL{Scheme: "http", Host: "localhost", Path: "/"}
	} else if s.base, err = url.Parse(o.Addr); err != nil || s.base.Scheme != "http" && s.base.Scheme != "https" || s.base.Host == "" {
		// The text of err may hold a password.
		return nil, errors.New("address of the HTTP server is neither http://host, https://host nor the absolute path of a socket")
	}
	if s.base.User != nil || s.base.RawQuery != "" || s.base.Fragment != "" {
		return nil, errors.New("address of the HTTP server: a login, query or fragment has no place there")
	}
	s.base.Path = "/" + strings.TrimPrefix(s.base.Path, "/") // else JoinPath's result is relative
	s.base = s.base.JoinPath(o.Path)
	if s.client, err = backend.NewHTTPClient(o.HTTP); err != nil {
		return nil, err
	}
	return s, nil
}

// Close closes idle connections. The store stays usable.
func (s *Store) Close() error {
	s.client.CloseIdleConnections()
	return nil
}

// Ping asks the server whether it is there; any answer below 500 will do.
func (s *Store) Ping(ctx context.Context) error {
	return backend.Ping(s.client, s.base.String(), nil)(ctx)
}

// Open returns the blob of ref. With ref.Size it makes no request: a missing blob or one
// of another size shows at the first read. Without, it asks for the first byte to learn
// the size.
func (s *Store) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	return s.objects.Open(ctx, ref)
}

// get asks for the blob that is called name.
func (s *Store) get(ctx context.Context, name string, header http.Header) (*http.Response, error) {
	u := s.base.JoinPath(name)
	resp, err := s.client.Do((&http.Request{Method: http.MethodGet, URL: u, Host: u.Host, Header: header}).WithContext(ctx))
	if err != nil || resp.StatusCode/100 == 2 {
		return resp, err
	}
	defer resp.Body.Close()
	// A short body that is read to its end leaves the connection usable.
	_, _ = io.CopyN(io.Discard, resp.Body, maxRefusal)
	return nil, backend.NewStatusError(resp)
}

// maxRefusal is how much of a refusal's body is read.
const maxRefusal = 4 << 10
