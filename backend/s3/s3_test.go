//go:build !nos3

package s3_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/s3"
)

const (
	bucket = "images.test"
	prefix = "nydus/blobs+1/"
	keyID  = "AKIDEXAMPLE"
	secret = "secret-not-for-logs"
)

// server is an S3 server in this process, with faults before it.
type server struct {
	*backendtest.HTTPFaults
	mem   *s3mem.Backend
	addr  string
	shift atomic.Int64 // of the server's clock, in nanoseconds
}

// Now is what gofakes3 compares the time of a request with.
func (s *server) Now() time.Time { return time.Now().Add(time.Duration(s.shift.Load())) }

func (s *server) Since(t time.Time) time.Duration { return s.Now().Sub(t) }

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{mem: s3mem.New()}
	if err := s.mem.CreateBucket(bucket); err != nil {
		t.Fatal(err)
	}
	fake := gofakes3.New(s.mem, gofakes3.WithTimeSource(s), gofakes3.WithLogger(gofakes3.DiscardLog())).Server()
	s.HTTPFaults = backendtest.NewHTTPFaults(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", s.Now().UTC().Format(http.TimeFormat))
		if !strings.Contains(r.Header.Get("Authorization"), "Credential="+keyID+"/") {
			refuse(http.StatusForbidden, "InvalidAccessKeyId")(w, r, nil)
			return
		}
		fake.ServeHTTP(w, r)
	}))
	ts := httptest.NewUnstartedServer(s)
	ts.Config.ErrorLog = log.New(io.Discard, "", 0) // gofakes3 sends the head of an error twice
	ts.Start()
	t.Cleanup(ts.Close)
	s.addr = ts.Listener.Addr().String()
	return s
}

// refuse answers as S3 does, with as much in the body as a careless server might echo.
func refuse(code int, name string) backendtest.Action {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(code)
		w.Write([]byte(`<?xml version="1.0"?><Error><Code>` + name + `</Code><Message>` + secret + ` ` + backendtest.Signature + `</Message></Error>`))
	}
}

func (s *server) put(t *testing.T, data []byte) backend.Ref {
	t.Helper()
	d := digest.FromBytes(data)
	s.putAt(t, d, data)
	return backend.Ref{Digest: d, Size: int64(len(data))}
}

func (s *server) putAt(t *testing.T, d digest.Digest, data []byte) {
	t.Helper()
	if _, err := s.mem.PutObject(bucket, prefix+d.Encoded(), nil, bytes.NewReader(data), int64(len(data)), nil); err != nil {
		t.Fatal(err)
	}
}

func (s *server) options() s3.Options {
	return s3.Options{
		Endpoint: s.addr, Scheme: "http", Region: "us-east-1", Bucket: bucket, Prefix: prefix,
		AccessKeyID: keyID, AccessKeySecret: secret,
	}
}

func newStore(t *testing.T, o s3.Options) *s3.Store {
	t.Helper()
	s, err := s3.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestConformance(t *testing.T) {
	backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
		s := newServer(t)
		var refs []backend.Ref
		for _, p := range blobs {
			refs = append(refs, s.put(t, p))
		}
		return newStore(t, s.options()), refs
	})
}

func TestFaults(t *testing.T) {
	backendtest.Faults(t, func(t *testing.T, stall time.Duration, blobs ...[]byte) backendtest.Faulty {
		s := newServer(t)
		f := backendtest.Faulty{Faults: s.HTTPFaults, Secrets: []string{keyID, secret}}
		for _, p := range blobs {
			f.Refs = append(f.Refs, s.put(t, p))
		}
		o := s.options()
		o.Stall = stall
		f.Store = newStore(t, o)
		return f
	})
}

// read reads the first n bytes of ref from a fresh blob.
func read(ctx context.Context, s backend.Store, ref backend.Ref, n int) ([]byte, error) {
	b, err := s.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	p := make([]byte, n)
	return p, b.ReadAt(ctx, p, 0)
}

func TestNew(t *testing.T) {
	good := s3.Options{Region: "eu-west-1", Bucket: "b", Anonymous: true}
	for name, c := range map[string]struct {
		change func(*s3.Options)
		want   string // in the error; "": none
	}{
		"aws":            {func(*s3.Options) {}, ""},
		"endpoint":       {func(o *s3.Options) { o.Endpoint, o.Scheme = "[::1]:9000", "http" }, ""},
		"no bucket":      {func(o *s3.Options) { o.Bucket = "" }, "bucket"},
		"odd bucket":     {func(o *s3.Options) { o.Bucket = "a/b" }, "bucket"},
		"no region":      {func(o *s3.Options) { o.Region = "" }, "region"},
		"odd region":     {func(o *s3.Options) { o.Region = "x/../y" }, "region"},
		"scheme":         {func(o *s3.Options) { o.Scheme = "ftp" }, "scheme"},
		"endpoint URL":   {func(o *s3.Options) { o.Endpoint = "https://host" }, "endpoint"},
		"endpoint path":  {func(o *s3.Options) { o.Endpoint = "host/path" }, "endpoint"},
		"endpoint login": {func(o *s3.Options) { o.Endpoint = "user:" + secret + "@host" }, "login"},
		"half a login":   {func(o *s3.Options) { o.Anonymous, o.AccessKeySecret = false, secret }, "go together"},
		"token alone":    {func(o *s3.Options) { o.SessionToken = secret }, "session token"},
		"both":           {func(o *s3.Options) { o.AccessKeyID, o.AccessKeySecret = keyID, secret }, "anonymous"},
		"CA file":        {func(o *s3.Options) { o.HTTP.CAFiles = []string{"/missing.pem"} }, "missing.pem"},
	} {
		o := good
		c.change(&o)
		s, err := s3.New(o)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error has a secret: %v", name, err)
		}
		if s != nil {
			s.Close()
		}
	}
}

// TestRefused: what the server says is what callers branch on, and no more.
func TestRefused(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") }))
	defer elsewhere.Close()
	with := func(next backendtest.Action, header ...string) backendtest.Action {
		return func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			next(w, r, h)
		}
	}
	s := newServer(t)
	ref := s.put(t, backendtest.Bytes(10_000, 1))
	store := newStore(t, s.options())
	for name, c := range map[string]struct {
		action    backendtest.Action
		is        error
		temporary bool
		after     time.Duration
		text      string
	}{
		"denied":    {refuse(403, "AccessDenied"), fs.ErrPermission, false, 0, "(AccessDenied)"},
		"wrong key": {refuse(403, "SignatureDoesNotMatch"), fs.ErrPermission, false, 0, "(SignatureDoesNotMatch)"},
		"no key":    {refuse(404, "NoSuchKey"), fs.ErrNotExist, false, 0, "(NoSuchKey)"},
		"no bucket": {refuse(404, "NoSuchBucket"), fs.ErrNotExist, false, 0, "(NoSuchBucket)"},
		"old token": {refuse(400, "ExpiredToken"), fs.ErrPermission, false, 0, "(ExpiredToken)"},
		"archived":  {refuse(403, "InvalidObjectState"), fs.ErrPermission, false, 0, "(InvalidObjectState)"},
		"slow down": {with(refuse(503, "SlowDown"), "Retry-After", "7"), nil, true, 7 * time.Second, "503 Service Unavailable (SlowDown)"},
		"too many":  {backendtest.TooMany(3), nil, true, 3 * time.Second, "429"},
		"internal":  {refuse(500, "InternalError"), nil, true, 0, "(InternalError)"},
		"no body":   {backendtest.Status(502), nil, true, 0, "502 Bad Gateway"},
		"odd code":  {refuse(403, "x-amz-signature=1"), fs.ErrPermission, false, 0, "403 Forbidden"},
		"region": {
			with(refuse(301, "PermanentRedirect"), "Location", elsewhere.URL, "X-Amz-Bucket-Region", "eu-central-1"),
			nil, false, 0, "the bucket is in region eu-central-1",
		},
		"redirect": {with(refuse(307, "TemporaryRedirect"), "Location", elsewhere.URL), nil, false, 0, "not followed"},
	} {
		s.Add(backendtest.All, 1, c.action)
		_, err := read(t.Context(), store, ref, 100)
		status, ok := errors.AsType[*backend.StatusError](err)
		if !ok || !strings.Contains(err.Error(), c.text) || backend.Temporary(err) != c.temporary || status.RetryAfter != c.after {
			t.Errorf("%s: error %v (temporary %v), want %q (%v)", name, err, backend.Temporary(err), c.text, c.temporary)
			continue
		}
		if c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: error %v, want %v", name, err, c.is)
		}
		for _, word := range []string{secret, backendtest.Signature, keyID} {
			if strings.Contains(err.Error(), word) {
				t.Errorf("%s: the error has a secret: %v", name, err)
			}
		}
	}
}

// TestEndlessRefusal: an error answer is read to a bound and not to its end.
func TestEndlessRefusal(t *testing.T) {
	s := newServer(t)
	ref := s.put(t, backendtest.Bytes(100, 1))
	sent := make(chan int, 1)
	s.Add(backendtest.All, 1, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.WriteHeader(http.StatusForbidden)
		n := 0
		for n < 1<<30 && r.Context().Err() == nil {
			m, err := w.Write(make([]byte, 32<<10))
			if n += m; err != nil {
				break
			}
		}
		sent <- n
	})
	if _, err := read(t.Context(), newStore(t, s.options()), ref, 10); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("error %v, want fs.ErrPermission", err)
	}
	if n := <-sent; n >= 1<<30 {
		t.Error("the whole of 1 GiB was read")
	}
}

// TestTLS: the options for connections are those of all stores.
func TestTLS(t *testing.T) {
	s := newServer(t)
	ref := s.put(t, backendtest.Bytes(100, 1))
	ts := httptest.NewUnstartedServer(s)
	ts.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshake that is to fail
	ts.StartTLS()
	t.Cleanup(ts.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	o := s.options()
	o.Scheme, o.Endpoint = "https", ts.Listener.Addr().String()
	if _, err := read(t.Context(), newStore(t, o), ref, 10); err == nil || backend.Temporary(err) {
		t.Errorf("unknown authority: error %v, want a permanent one", err)
	}
	o.HTTP.CAFiles = []string{ca}
	if _, err := read(t.Context(), newStore(t, o), ref, 10); err != nil {
		t.Error(err)
	}
}

// TestReplaced: bytes of two versions of an object never come from one blob, whether
// the server minds If-Match (S3) or not (gofakes3).
func TestReplaced(t *testing.T) {
	s := newServer(t)
	ref := s.put(t, backendtest.Bytes(1000, 1))
	store := newStore(t, s.options())
	for _, minds := range []bool{false, true} {
		b, err := store.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if err := b.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
			t.Fatal(err)
		}
		s.putAt(t, ref.Digest, backendtest.Bytes(1000, 2))
		if minds {
			s.Add(func(r *http.Request) bool { return r.Header.Get("If-Match") != "" }, 1, refuse(412, "PreconditionFailed"))
		}
		err = b.ReadAt(t.Context(), make([]byte, 10), 500)
		if err == nil || backend.Temporary(err) || !strings.Contains(err.Error(), "replaced") {
			t.Errorf("server that minds If-Match %v: error %v, want that the object was replaced", minds, err)
		}
		s.putAt(t, ref.Digest, backendtest.Bytes(1000, 1))
	}
}

// TestClock: a machine whose clock is wrong reads all the same, and pays for it once.
func TestClock(t *testing.T) {
	s := newServer(t)
	ref := s.put(t, backendtest.Bytes(100, 1))
	store := newStore(t, s.options())
	s.shift.Store(int64(time.Hour))
	for range 3 {
		if _, err := read(t.Context(), store, ref, 10); err != nil {
			t.Fatal(err)
		}
	}
	if all, _ := s.Requests(); all != 4 {
		t.Errorf("%d requests, want one more than the 3 reads", all)
	}
}
