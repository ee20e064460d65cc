package services

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	tokenService = "erofsd tests"
	tokenIssuer  = "erofsd token service"
	// leeway is for how long docker-registry takes a token that has expired.
	leeway = time.Minute
)

// A TokenServer gives bearer tokens for pulling to who logs in with User and Password.
type TokenServer struct {
	URL string

	key  *ecdsa.PrivateKey
	der  []byte
	cert string // PEM file, for registries

	mu       sync.Mutex // guards what follows
	lifetime time.Duration
	issued   int
}

// NewTokenServer starts one. Registries refuse its tokens after lifetime, which it does
// not tell: they say that they live for five minutes more, as tokens do whose
// service has another clock or takes them back.
func NewTokenServer(t testing.TB, lifetime time.Duration) *TokenServer {
	t.Helper()
	s := &TokenServer{key: newKey(t), lifetime: lifetime}
	template := certificate(tokenIssuer)
	template.IsCA, template.BasicConstraintsValid = true, true
	s.der = sign(t, template, template, s.key, s.key)
	s.cert = writePEM(t, filepath.Join(scratch(t), "token.pem"), "CERTIFICATE", s.der)
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.URL = server.URL
	return s
}

// Issued is how many tokens were given.
func (s *TokenServer) Issued() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.issued
}

// ServeHTTP gives a token, by GET or POST as the distribution's documentation has it.
func (s *TokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 1<<16)
	user, password, ok := r.BasicAuth()
	if !ok {
		user, password = r.FormValue("username"), r.FormValue("password")
	}
	if user != User || password != Password || r.FormValue("service") != tokenService {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
		return
	}
	var access []object
	for scope := range strings.SplitSeq(strings.Join(r.Form["scope"], " "), " ") {
		if part := strings.Split(scope, ":"); len(part) == 3 {
			access = append(access, object{"type": part[0], "name": part[1], "actions": []string{"pull"}})
		}
	}
	s.mu.Lock()
	s.issued++
	expires := time.Now().Add(s.lifetime - leeway)
	s.mu.Unlock()
	token, err := s.token(object{
		"iss": tokenIssuer, "sub": user, "aud": tokenService, "exp": expires.Unix(), "nbf": expires.Add(-time.Hour).Unix(),
		"iat": time.Now().Unix(), "jti": rand.Text(), "access": access,
	})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(object{"token": token, "access_token": token, "expires_in": 300})
}

// token signs claims (RFC 7515, with the algorithm ES256).
func (s *TokenServer) token(claims object) (string, error) {
	header, err := json.Marshal(object{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(s.der)}})
	if err != nil {
		return "", err
	}
	body, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	text := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(body)
	sum := sha256.Sum256([]byte(text))
	a, b, err := ecdsa.Sign(rand.Reader, s.key, sum[:])
	if err != nil {
		return "", err
	}
	signature := make([]byte, 64)
	a.FillBytes(signature[:32])
	b.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}
