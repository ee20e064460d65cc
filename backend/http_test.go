package backend_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend"
)

// writeCert writes a certificate for name that signs itself, and its key.
func writeCert(t *testing.T, name, certFile, keyFile string, changed time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, changed, changed); err != nil {
			t.Fatal(err)
		}
	}
}

func newClient(t *testing.T, o backend.HTTPOptions) *http.Client {
	t.Helper()
	c, err := backend.NewHTTPClient(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// get returns the body of the answer.
func get(c *http.Client, url string) (string, error) {
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	p, err := io.ReadAll(resp.Body)
	return string(p), err
}

func TestClientCertificate(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) > 0 {
			io.WriteString(w, r.TLS.PeerCertificates[0].Subject.CommonName)
		}
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	server.StartTLS()
	defer server.Close()
	if _, err := get(newClient(t, backend.HTTPOptions{}), server.URL); err == nil || backend.Temporary(err) {
		t.Errorf("unknown authority: error %v", err)
	}
	if body, err := get(newClient(t, backend.HTTPOptions{SkipVerify: true}), server.URL); err != nil || body != "" {
		t.Errorf("without certificate: %q, error %v", body, err)
	}

	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	o := backend.HTTPOptions{SkipVerify: true, ClientCert: cert, ClientKey: key}
	if _, err := backend.NewHTTPClient(o); err == nil || !strings.Contains(err.Error(), cert) {
		t.Errorf("missing files: error %v", err)
	}
	if _, err := backend.NewHTTPClient(backend.HTTPOptions{ClientCert: cert}); err == nil || !strings.Contains(err.Error(), cert) {
		t.Errorf("certificate without key: error %v", err)
	}
	start := time.Now().Add(-time.Hour)
	writeCert(t, "first", cert, key, start)
	c := newClient(t, o)
	renewals := []func(){
		func() {},
		func() { writeCert(t, "second", cert, key, start.Add(time.Second)) },
		func() { os.WriteFile(cert, []byte("half"), 0o600) },
		func() { writeCert(t, "third", cert, key, start.Add(2*time.Second)) },
	}
	for i, want := range []string{"first", "second", "second", "third"} {
		renewals[i]()
		c.CloseIdleConnections()
		if body, err := get(c, server.URL); err != nil || body != want {
			t.Errorf("certificate %q, error %v, want %q", body, err, want)
		}
	}
}

func TestHeader(t *testing.T) {
	got := make(chan http.Header, 1)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r.Header }))
	defer server.Close()
	c := newClient(t, backend.HTTPOptions{Header: http.Header{
		"x-site": {"a", "b"}, "Authorization": {"never"}, "Range": {"never"}, "User-Agent": {"never"}, "Accept": {"default"},
	}})
	req, err := http.NewRequest(http.MethodGet, server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "own")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	h := <-got
	for name, want := range map[string]string{"X-Site": "a,b", "Authorization": "", "Range": "", "User-Agent": "erofsd", "Accept": "own"} {
		if v := strings.Join(h[name], ","); v != want {
			t.Errorf("%s is %q, want %q", name, v, want)
		}
	}
	if len(req.Header) != 1 {
		t.Errorf("the caller's request was changed: %v", req.Header)
	}
}

// TestUseHTTP: the proxy is asked for http instead of https, the caller sees https, and
// a request with a password goes around it.
func TestUseHTTP(t *testing.T) {
	origin := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "origin") }))
	defer origin.Close()
	var refused atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			refused.Add(1)
			http.Error(w, "no tunnels", http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "proxy "+r.URL.Scheme+" "+r.URL.Path)
	}))
	defer proxy.Close()
	p := backend.ProxyOptions{URL: proxy.URL, UseHTTP: true}
	c := newClient(t, backend.HTTPOptions{SkipVerify: true, Proxy: p})
	resp, err := c.Get(origin.URL + "/x")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(body) != "proxy http /x" || resp.Request.URL.String() != origin.URL+"/x" {
		t.Errorf("answer %q of %v, error %v", body, resp.Request.URL, err)
	}
	req, err := http.NewRequestWithContext(backend.Private(t.Context()), http.MethodGet, origin.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err = c.Do(req); err != nil {
		t.Fatal(err)
	}
	body, err = io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(body) != "origin" {
		t.Errorf("private request: answer %q, error %v", body, err)
	}

	// A tunnel that the proxy refuses.
	p.UseHTTP = false
	if _, err := get(newClient(t, backend.HTTPOptions{SkipVerify: true, Proxy: p}), origin.URL); !backend.Temporary(err) || refused.Load() != 1 {
		t.Errorf("refused tunnel: error %v", err)
	}
	p.Fallback = true
	if body, err := get(newClient(t, backend.HTTPOptions{SkipVerify: true, Proxy: p}), origin.URL); err != nil || body != "origin" || refused.Load() != 2 {
		t.Errorf("refused tunnel with fallback: answer %q, error %v", body, err)
	}
}
