package regserver

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// do sends a request and returns the answer's body.
func do(t *testing.T, client *http.Client, method, url string, body []byte, header string, want int) []byte {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if name, value, ok := strings.Cut(header, ": "); ok {
		req.Header.Set(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != want {
		t.Fatalf("%s %s: status %d %s, error %v, want status %d", method, url, resp.StatusCode, got, err, want)
	}
	return got
}

func TestCountsAndKeeps(t *testing.T) {
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	dir := t.TempDir()
	s, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	blob := bytes.Repeat([]byte("0123456789"), 1000)
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(blob))
	manifest := []byte(`{"schemaVersion":2}`)
	const mediaType = "application/vnd.oci.image.manifest.v1+json"
	base := "http://" + s.Addr() + "/v2/some/image/"
	do(t, client, "POST", base+"blobs/uploads/?digest="+digest, blob, "", http.StatusCreated)
	do(t, client, "PUT", base+"manifests/v1", manifest, "Content-Type: "+mediaType, http.StatusCreated)
	if n := s.Stats().BlobRequests; n != 0 {
		t.Errorf("%d fetches counted after a push", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s, err = New(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	base = "http://" + s.Addr() + "/v2/some/image/"
	if got := do(t, client, "GET", base+"manifests/v1", nil, "", http.StatusOK); !bytes.Equal(got, manifest) {
		t.Errorf("the manifest came back as %q after a restart", got)
	}
	if got := do(t, client, "GET", base+"blobs/"+digest, nil, "Range: bytes=13-15", http.StatusPartialContent); string(got) != "345" {
		t.Errorf("a range came back as %q", got)
	}
	if got := do(t, client, "GET", base+"blobs/"+digest, nil, "", http.StatusOK); !bytes.Equal(got, blob) {
		t.Errorf("the blob came back with %d bytes, not %d", len(got), len(blob))
	}
	do(t, client, "GET", base+"blobs/sha256:"+strings.Repeat("0", 64), nil, "", http.StatusNotFound)
	got, want := s.Stats(), Blob{Requests: 2, Bytes: int64(len(blob)) + 3}
	if got.Blobs[digest] != want || got.BlobRequests != want.Requests || got.BlobBytes != want.Bytes || got.Requests != 4 {
		t.Errorf("counted %+v, want %+v for the one blob in 4 requests", got, want)
	}
}
