package oss_test

import (
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
)

func TestFaults(t *testing.T) {
	backendtest.Faults(t, func(t *testing.T, stall time.Duration, blobs ...[]byte) backendtest.Faulty {
		s := newServer(t)
		f := backendtest.Faulty{Faults: s.HTTPFaults, Secrets: []string{keyID, secret}}
		for _, p := range blobs {
			f.Refs = append(f.Refs, s.put(p))
		}
		o := s.options()
		o.Stall = stall
		f.Store = newStore(t, o)
		return f
	})
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
	ref := s.put(backendtest.Bytes(10_000, 1))
	store := newStore(t, s.options())
	for name, c := range map[string]struct {
		action    backendtest.Action
		is        error
		temporary bool
		after     time.Duration
		text      string
	}{
		"denied":    {refuse(403, "AccessDenied"), fs.ErrPermission, false, 0, "(AccessDenied)"},
		"no key":    {refuse(404, "NoSuchKey"), fs.ErrNotExist, false, 0, "(NoSuchKey)"},
		"no bucket": {refuse(404, "NoSuchBucket"), fs.ErrNotExist, false, 0, "(NoSuchBucket)"},
		"slow down": {with(refuse(503, "DownloadTrafficRateLimitExceeded"), "Retry-After", "7"), nil, true, 7 * time.Second, "503 Service Unavailable (DownloadTrafficRateLimitExceeded)"},
		"too many":  {backendtest.TooMany(3), nil, true, 3 * time.Second, "429"},
		"internal":  {refuse(500, "InternalError"), nil, true, 0, "(InternalError)"},
		"no body":   {backendtest.Status(502), nil, true, 0, "502 Bad Gateway"},
		"odd code":  {refuse(403, "x-oss-signature=1"), fs.ErrPermission, false, 0, "403 Forbidden"},
		"redirect":  {with(refuse(301, "AccessDenied"), "Location", elsewhere.URL), nil, false, 0, "not followed"},
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

// TestReplaced: bytes of two versions of an object never come from one blob.
func TestReplaced(t *testing.T) {
	s := newServer(t)
	ref := s.put(backendtest.Bytes(1000, 1))
	b, err := newStore(t, s.options()).Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
		t.Fatal(err)
	}
	s.putAt(ref.Digest, backendtest.Bytes(1000, 2))
	err = b.ReadAt(t.Context(), make([]byte, 10), 500)
	if err == nil || backend.Temporary(err) || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("error %v, want that the object was replaced", err)
	}
}
