//go:build !nos3

package s3_test

import (
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend/backendtest"
)

// clearLogin makes the login of whoever runs the test invisible.
func clearLogin(t *testing.T) {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
		}
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
}

func TestLoginFound(t *testing.T) {
	s := newServer(t)
	ref := s.put(t, backendtest.Bytes(100, 1))
	o := s.options()
	o.AccessKeyID, o.AccessKeySecret = "", ""
	for name, prepare := range map[string]func(t *testing.T){
		"environment": func(t *testing.T) {
			t.Setenv("AWS_ACCESS_KEY_ID", keyID)
			t.Setenv("AWS_SECRET_ACCESS_KEY", secret)
		},
		"file": func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "credentials")
			text := "[work]\naws_access_key_id=" + keyID + "\naws_secret_access_key=" + secret + "\n"
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
			t.Setenv("AWS_PROFILE", "work")
		},
	} {
		t.Run(name, func(t *testing.T) {
			clearLogin(t)
			prepare(t)
			if _, err := read(t.Context(), newStore(t, o), ref, 10); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		clearLogin(t)
		before, _ := s.Requests()
		if _, err := read(t.Context(), newStore(t, o), ref, 10); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("error %v, want fs.ErrPermission", err)
		}
		if after, _ := s.Requests(); after != before {
			t.Error("a read was tried without the login that was to be found")
		}
	})
	t.Run("anonymous", func(t *testing.T) {
		clearLogin(t)
		t.Setenv("AWS_ACCESS_KEY_ID", keyID)
		t.Setenv("AWS_SECRET_ACCESS_KEY", secret)
		o := o
		o.Anonymous = true
		signed := false
		s.Add(backendtest.All, 1, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			signed = r.Header.Get("Authorization") != ""
			refuse(403, "AccessDenied")(w, r, nil)
		})
		if _, err := read(t.Context(), newStore(t, o), ref, 10); !errors.Is(err, fs.ErrPermission) || signed {
			t.Errorf("error %v, want fs.ErrPermission; signed %v", err, signed)
		}
	})
}

// TestLoginEnds: a temporary login that the server no longer takes is renewed, once for
// all readers, and the reads succeed.
func TestLoginEnds(t *testing.T) {
	clearLogin(t)
	var given atomic.Int64
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n := given.Add(1)
		end := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
		token := strings.Repeat("x", int(n))
		w.Write([]byte(`{"AccessKeyId":"` + keyID + `","SecretAccessKey":"` + secret + `","Token":"` + token + `","Expiration":"` + end + `"}`))
	}))
	defer service.Close()
	t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.URL)
	s := newServer(t)
	ref := s.put(t, backendtest.Bytes(100, 1))
	o := s.options()
	o.AccessKeyID, o.AccessKeySecret = "", ""
	store := newStore(t, o)
	good := func(token string) {
		s.Clear()
		s.Add(func(r *http.Request) bool { return r.Header.Get("X-Amz-Security-Token") != token }, -1, refuse(400, "ExpiredToken"))
	}
	for round := 1; round <= 2; round++ {
		good(strings.Repeat("x", round))
		errs := make(chan error)
		for range 32 {
			go func() {
				_, err := read(t.Context(), store, ref, 10)
				errs <- err
			}()
		}
		for range 32 {
			if err := <-errs; err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if n := given.Load(); n != int64(round) {
			t.Fatalf("round %d: %d logins were given", round, n)
		}
	}
}
