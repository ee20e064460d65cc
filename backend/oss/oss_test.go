package oss_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/oss"
)

const (
	bucket = "images"
	prefix = "nydus/blobs +1/"
	keyID  = "LTAIEXAMPLE"
	secret = "secret-not-for-logs"
)

// server is OSS in this process, with faults before it.
type server struct {
	*backendtest.HTTPFaults
	oss   *fake
	addr  string
	shift atomic.Int64 // of the server's clock, in nanoseconds
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{}
	s.oss = &fake{
		id: keyID, secret: secret, region: "cn-test", objects: map[string][]byte{}, versions: map[string]int{},
		clock: func() time.Time { return time.Now().Add(time.Duration(s.shift.Load())) },
	}
	s.HTTPFaults = backendtest.NewHTTPFaults(s.oss)
	ts := httptest.NewServer(s)
	t.Cleanup(ts.Close)
	s.addr = ts.Listener.Addr().String()
	return s
}

// refuse answers as OSS does, with as much in the body as a careless server might echo.
func refuse(code int, name string) backendtest.Action {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(code)
		w.Write([]byte(`<?xml version="1.0"?><Error><Code>` + name + `</Code><Message>` + secret + `</Message><StringToSign>` + backendtest.Signature + `</StringToSign></Error>`))
	}
}

func (s *server) put(data []byte) backend.Ref {
	d := digest.FromBytes(data)
	s.putAt(d, data)
	return backend.Ref{Digest: d, Size: int64(len(data))}
}

func (s *server) putAt(d digest.Digest, data []byte) {
	s.oss.put(bucket+"/"+prefix+d.Encoded(), data)
}

func (s *server) options() oss.Options {
	return oss.Options{
		Endpoint: s.addr, Scheme: "http", Bucket: bucket, Prefix: prefix,
		AccessKeyID: keyID, AccessKeySecret: secret,
	}
}

func newStore(t *testing.T, o oss.Options) *oss.Store {
	t.Helper()
	s, err := oss.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
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

func TestConformance(t *testing.T) {
	for name, region := range map[string]string{"V1": "", "V4": "cn-test"} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
				s := newServer(t)
				var refs []backend.Ref
				for _, p := range blobs {
					refs = append(refs, s.put(p))
				}
				o := s.options()
				o.Region = region
				return newStore(t, o), refs
			})
		})
	}
}

func TestNew(t *testing.T) {
	good := oss.Options{Endpoint: "oss-cn-test.aliyuncs.com", Bucket: bucket}
	for name, c := range map[string]struct {
		change func(*oss.Options)
		want   string // in the error; "": none
	}{
		"anonymous":      {func(*oss.Options) {}, ""},
		"no bucket":      {func(o *oss.Options) { o.Bucket = "" }, "bucket"},
		"odd bucket":     {func(o *oss.Options) { o.Bucket = "a/b/c" }, "bucket"},
		"odd region":     {func(o *oss.Options) { o.Region = "x/../y" }, "region"},
		"scheme":         {func(o *oss.Options) { o.Scheme = "ftp" }, "scheme"},
		"no endpoint":    {func(o *oss.Options) { o.Endpoint = "" }, "endpoint"},
		"endpoint URL":   {func(o *oss.Options) { o.Endpoint = "https://host" }, "endpoint"},
		"endpoint login": {func(o *oss.Options) { o.Endpoint = "user:" + secret + "@host" }, "login"},
		"half a login":   {func(o *oss.Options) { o.AccessKeySecret = secret }, "go together"},
		"token alone":    {func(o *oss.Options) { o.SecurityToken = secret }, "security token"},
		"CA file":        {func(o *oss.Options) { o.HTTP.CAFiles = []string{"/missing.pem"} }, "missing.pem"},
	} {
		o := good
		c.change(&o)
		s, err := oss.New(o)
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

// TestEndpoints: the name of the endpoint says how a request is signed, and the bucket
// comes before it.
func TestEndpoints(t *testing.T) {
	s := newServer(t)
	ref := s.put(backendtest.Bytes(100, 1))
	// All names lead to one socket.
	socket := filepath.Join(t.TempDir(), "oss.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ts := httptest.NewUnstartedServer(s)
	ts.Listener.Close()
	ts.Listener = l
	ts.Start()
	t.Cleanup(ts.Close)
	for endpoint, version := range map[string]string{
		"oss-cn-test.aliyuncs.com":          "4",
		"oss-cn-test-internal.aliyuncs.com": "4",
		"cn-test.oss.aliyuncs.com":          "4",
		"OSS-cn-test.aliyuncs.com:8080":     "4",
		"oss-accelerate.aliyuncs.com":       "1",
		"oss.example.com":                   "1",
		"oss-cn-test.example.com":           "1",
		"aliyuncs.com":                      "1",
	} {
		o := s.options()
		o.Endpoint, o.HTTP.Socket = endpoint, socket
		before := s.oss.seen(version)
		if _, err := read(t.Context(), newStore(t, o), ref, 10); err != nil {
			t.Errorf("%s: %v", endpoint, err)
		}
		if s.oss.seen(version) != before+1 {
			t.Errorf("%s: the request was not signed by version %s", endpoint, version)
		}
	}
}

func TestLogin(t *testing.T) {
	for name, c := range map[string]struct {
		id, secret, token string // what the server wants
		change            func(*oss.Options)
		ok                bool
		text              string
	}{
		"right":           {keyID, secret, "", func(*oss.Options) {}, true, ""},
		"token":           {keyID, secret, "tok", func(o *oss.Options) { o.SecurityToken = "tok" }, true, ""},
		"wrong secret":    {keyID, secret, "", func(o *oss.Options) { o.AccessKeySecret = "wrong" }, false, "(SignatureDoesNotMatch)"},
		"wrong id":        {keyID, secret, "", func(o *oss.Options) { o.AccessKeyID = "wrong" }, false, "(InvalidAccessKeyId)"},
		"wrong region":    {keyID, secret, "", func(o *oss.Options) { o.Region = "cn-other" }, false, ""},
		"anonymous":       {"", "", "", func(o *oss.Options) { o.AccessKeyID, o.AccessKeySecret = "", "" }, true, ""},
		"login is wanted": {keyID, secret, "", func(o *oss.Options) { o.AccessKeyID, o.AccessKeySecret = "", "" }, false, "(AccessDenied)"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.oss.id, s.oss.secret, s.oss.token = c.id, c.secret, c.token
			ref := s.put(backendtest.Bytes(100, 1))
			for _, region := range []string{"", "cn-test"} {
				o := s.options()
				o.Region = region
				c.change(&o)
				if _, err := read(t.Context(), newStore(t, o), ref, 10); c.ok && err != nil {
					t.Errorf("region %q: %v", region, err)
				} else if !c.ok && (!errors.Is(err, fs.ErrPermission) || backend.Temporary(err) || !strings.Contains(err.Error(), c.text)) {
					t.Errorf("region %q: error %v, want a permission error with %s", region, err, c.text)
				}
			}
		})
	}
}

// TestClock: a machine whose clock is wrong reads all the same and pays for it once,
// unless the server gives no better time.
func TestClock(t *testing.T) {
	for _, region := range []string{"", "cn-test"} {
		s := newServer(t)
		ref := s.put(backendtest.Bytes(100, 1))
		o := s.options()
		o.Region = region
		store := newStore(t, o)
		s.shift.Store(int64(-time.Hour))
		for range 3 {
			if _, err := read(t.Context(), store, ref, 10); err != nil {
				t.Fatal(err)
			}
		}
		if all, _ := s.Requests(); all != 4 {
			t.Errorf("%d requests, want one more than the 3 reads", all)
		}
		s.Add(backendtest.All, -1, refuse(403, "RequestTimeTooSkewed"))
		_, err := read(t.Context(), store, ref, 10)
		if !errors.Is(err, fs.ErrPermission) || backend.Temporary(err) || !strings.Contains(err.Error(), "clock is ahead") {
			t.Errorf("error %v, want a permission error that speaks of the clock", err)
		}
	}
}
