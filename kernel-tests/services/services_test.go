package services

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// ask makes a request on a connection of its own.
func ask(t *testing.T, transport *http.Transport, method, url, body string, header ...string) (status int, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	if transport == nil {
		transport = &http.Transport{}
	}
	resp, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	p, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(p)
}

// want asks and compares the status.
func want(t *testing.T, status int, transport *http.Transport, method, url, body string, header ...string) string {
	t.Helper()
	got, text := ask(t, transport, method, url, body, header...)
	if got != status {
		t.Errorf("%s %s: %d %s, want %d", method, url, got, text, status)
	}
	return text
}

// push stores a blob in a registry and returns its path in there.
func push(t *testing.T, addr, blob string) string {
	t.Helper()
	sum := sha256.Sum256([]byte(blob))
	digest := "sha256:" + hex.EncodeToString(sum[:])
	r, err := http.Post("http://"+addr+"/v2/a/b/blobs/uploads/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	want(t, http.StatusCreated, nil, http.MethodPut, r.Header.Get("Location")+"&digest="+digest, blob, "Content-Type", "application/octet-stream")
	return "/v2/a/b/blobs/" + digest
}

func TestRegistry(t *testing.T) {
	const blob = "a blob that several registries have"
	dir := filepath.Join(t.TempDir(), "content")
	plain := Registry(t, RegistryOptions{Dir: dir})
	path := push(t, plain.Addr, blob)
	get := func(t *testing.T, p *Process, transport *http.Transport, scheme string, status int, header ...string) {
		t.Helper()
		if text := want(t, status, transport, http.MethodGet, scheme+"://"+p.Addr+path, "", header...); status == http.StatusOK && text != blob {
			t.Errorf("got %q", text)
		}
	}
	get(t, plain, nil, "http", http.StatusOK)

	t.Run("restart", func(t *testing.T) {
		for _, end := range []func(){plain.Stop, plain.Kill} {
			end()
			get(t, plain, nil, "http", 0)
			plain.Start(t)
			get(t, plain, nil, "http", http.StatusOK)
		}
	})
	t.Run("login", func(t *testing.T) {
		p := Registry(t, RegistryOptions{Dir: dir, Login: true})
		get(t, p, nil, "http", http.StatusUnauthorized)
		get(t, p, nil, "http", http.StatusOK, "Authorization", "Basic "+Auth())
	})
	t.Run("TLS", func(t *testing.T) {
		ca := NewCA(t)
		p := Registry(t, RegistryOptions{Dir: dir, TLS: ca})
		get(t, p, nil, "https", 0) // a stranger's certificate
		get(t, p, &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, "https", http.StatusOK)
	})
	t.Run("mirror", func(t *testing.T) {
		p := Registry(t, RegistryOptions{Upstream: "http://" + plain.Addr})
		get(t, p, nil, "http", http.StatusOK)
	})
	t.Run("token", func(t *testing.T) {
		const lifetime = 2 * time.Second
		s := NewTokenServer(t, lifetime)
		p := Registry(t, RegistryOptions{Dir: dir, Token: s})
		get(t, p, nil, "http", http.StatusUnauthorized)
		query := s.URL + "/token?service=" + url.QueryEscape(tokenService) + "&scope=repository:a/b:pull"
		want(t, http.StatusUnauthorized, nil, http.MethodGet, query, "")
		var answer struct{ Token string }
		if err := json.Unmarshal([]byte(want(t, http.StatusOK, nil, http.MethodGet, query, "", "Authorization", "Basic "+Auth())), &answer); err != nil {
			t.Fatal(err)
		}
		get(t, p, nil, "http", http.StatusOK, "Authorization", "Bearer "+answer.Token)
		time.Sleep(lifetime + time.Second)
		get(t, p, nil, "http", http.StatusUnauthorized, "Authorization", "Bearer "+answer.Token)
		if n := s.Issued(); n != 1 {
			t.Errorf("%d tokens were given", n)
		}
	})
}

func TestSquid(t *testing.T) {
	p := Squid(t)
	origin := Registry(t, RegistryOptions{TLS: NewCA(t)})
	plain := Registry(t, RegistryOptions{})
	transport := &http.Transport{
		Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: p.Addr}),
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	defer transport.CloseIdleConnections()
	want(t, http.StatusOK, transport, http.MethodGet, "https://"+origin.Addr+"/v2/", "")
	want(t, http.StatusOK, transport, http.MethodGet, "http://"+plain.Addr+"/v2/", "")
	p.Stop() // when killed it may not have logged its last request
	want(t, 0, transport, http.MethodGet, "http://"+plain.Addr+"/v2/", "")
	p.Start(t)
	want(t, http.StatusOK, transport, http.MethodGet, "http://"+plain.Addr+"/v2/", "")
	p.Stop()
	if tunnels, requests := p.Served(t, "CONNECT "+origin.Addr), p.Served(t, "GET http://"+plain.Addr+"/v2/"); tunnels != 1 || requests != 2 {
		t.Errorf("squid logged %d tunnels and %d requests, want 1 and 2", tunnels, requests)
	}
}

// TestDisk reads the blob where the partition table says, by the name that udev would give.
func TestDisk(t *testing.T) {
	testenv.Root(t)
	const name = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	dir := t.TempDir()
	data := bytes.Repeat([]byte("some blob"), 1000)
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
	device := Disk(t, dir)
	out, err := exec.Command("sgdisk", "--info=1", device).CombinedOutput()
	if err != nil {
		t.Fatalf("sgdisk: %v\n%s", err, out)
	}
	for _, want := range []string{"First sector: 2048", "Partition name: '" + name[:32] + "'", "01234567-89AB-CDEF-0123-456789ABCDEF"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("sgdisk does not say %q:\n%s", want, out)
		}
	}
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, 2048*sector); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the blob is not in the partition: %v", err)
	}
}

// TestOSS: strangers get nothing.
func TestOSS(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "object"), []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	name := "http://" + OSS(t, dir, "some/prefix/") + "/" + Bucket + "/some/prefix/object"
	date := time.Now().UTC().Format(http.TimeFormat)
	for _, auth := range []string{"", "OSS " + KeyID + ":c2lnbmF0dXJl", "OSS somebody:c2lnbmF0dXJl"} {
		want(t, http.StatusForbidden, nil, http.MethodGet, name, "", "Authorization", auth, "Date", date)
	}
}

func TestS3(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "object"), []byte("data"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := S3(t, dir, "some/prefix")
	name := "http://" + p.Addr + "/" + Bucket + "/some/prefix/object"
	if text := want(t, http.StatusForbidden, nil, http.MethodGet, name, ""); !strings.Contains(text, "AccessDenied") {
		t.Errorf("a stranger gets %q", text)
	}
	p.Kill()
	want(t, 0, nil, http.MethodGet, name, "")
	p.Start(t)
	want(t, http.StatusForbidden, nil, http.MethodGet, name, "")
}
