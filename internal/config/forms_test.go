package config

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func ptr[T any](v T) *T { return &v }

// formImage is what all files of a folder of testdata say, but for the backend.
func formImage(b Backend) Image {
	return Image{
		Backend:  b,
		WorkDir:  "/var/lib/cache",
		Amplify:  ptr(Size(64 << 10)),
		Prefetch: Prefetch{Enable: ptr(true), Threads: 4, BatchSize: 128 << 10, BandwidthLimit: 10 << 20, All: true},
	}
}

func defaultHTTP() HTTP {
	var h HTTP
	h.setDefaults()
	return h
}

func formBackends() map[string]Backend {
	plain, timeout, retry, proxy := defaultHTTP(), defaultHTTP(), defaultHTTP(), defaultHTTP()
	timeout.Timeout = Duration(7 * time.Second)
	retry.RetryLimit = ptr(0)
	proxy.Proxy.URL = "http://127.0.0.1:65001"
	second := Mirror{Host: "second.example"}
	second.setDefaults()
	all := plain
	all.SkipVerify, all.CAFiles, all.RetryLimit = true, []string{"/etc/ca.pem"}, ptr(2)
	all.Timeout, all.ConnectTimeout = Duration(7*time.Second), Duration(3*time.Second)
	all.Proxy = Proxy{
		URL: "http://127.0.0.1:65001", Login: "user:pass-marker", PingURL: "http://127.0.0.1:65003/healthy",
		CheckInterval: Duration(9 * time.Second), CheckPause: Duration(time.Minute), UseHTTP: true,
	}
	all.Mirrors = []Mirror{{
		Host: "http://mirror.example:65001", PingURL: "http://mirror.example:65003/ping",
		Headers:       map[string]Secret{"X-Dragonfly-Registry": "https://registry.example"},
		CheckInterval: Duration(6 * time.Second), CheckPause: Duration(30 * time.Second), FailureLimit: 4, AuthThrough: true,
	}, second}
	return map[string]Backend{
		TypeRegistry: {Registry: &Registry{
			HTTP: all, Scheme: "https", Host: "registry.example:5000", Repo: "library/app",
			Auth: "dXNlcjpwYXNzLW1hcmtlcg==", Token: "token-marker", BlobURLScheme: "http", BlobRedirectedHost: "cdn.example:8080",
		}},
		TypeS3: {S3: &S3{
			HTTP: timeout, Scheme: "http", Endpoint: "minio.example:9000", Region: "us-east-1",
			Bucket: "images", Prefix: "blobs/", AccessKeyID: "AKID", AccessKeySecret: "secret-marker",
		}},
		TypeOSS: {OSS: &OSS{
			HTTP: retry, Scheme: "https", Endpoint: "oss-cn-hangzhou.example",
			Bucket: "images", Prefix: "blobs/", AccessKeyID: "AKID", AccessKeySecret: "secret-marker",
		}},
		TypeHTTPProxy: {HTTPProxy: &HTTPProxy{HTTP: proxy, Addr: "http://127.0.0.1:9977", Path: "/blobs"}},
		TypeLocalFS:   {LocalFS: &LocalFS{Dir: "/var/blobs", AltDirs: []string{"/mnt/a", "/mnt/b"}}},
		TypeLocalDisk: {LocalDisk: &LocalDisk{Device: "/dev/vdb", DisableGPT: true}},
	}
}

// TestForms reads the same image from each form, for each backend.
func TestForms(t *testing.T) {
	forms := map[string]func(t *testing.T, file string) Image{
		"v1.json": nydusForm, "v2.json": nydusForm, "v2.toml": nydusForm, "erofsd.toml": ownForm, "entry.json": entryForm,
	}
	for kind, backend := range formBackends() {
		backend.Type = kind
		want := formImage(backend)
		for form, read := range forms {
			t.Run(kind+"/"+form, func(t *testing.T) {
				w := want
				if form == "entry.json" {
					w.Amplify = nil // a legacy entry has no such key
				}
				got := read(t, filepath.Join("testdata", kind, form))
				if diff := cmp.Diff(w, got); diff != "" {
					t.Errorf("image (-want +got):\n%s", diff)
				}
				if !got.Equal(w) || got.Backend.Key() != want.Backend.Key() {
					t.Error("the images are not equal, or their backends have different keys")
				}
			})
		}
	}
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func nydusForm(t *testing.T, file string) Image {
	got, warnings, err := ParseNydus(readFile(t, file))
	if err != nil || len(warnings) > 0 {
		t.Fatalf("error %v, warnings %q", err, warnings)
	}
	return got
}

func entryForm(t *testing.T, file string) Image {
	got, warnings, err := ParseBlobEntry(readFile(t, file))
	if err != nil || len(warnings) > 0 {
		t.Fatalf("error %v, warnings %q", err, warnings)
	}
	want := BlobEntry{Type: "bootstrap", ID: "fsid-1", DomainID: "domain-1", Bootstrap: "/var/lib/image.boot", Image: got.Image}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("entry (-want +got):\n%s", diff)
	}
	state, err := got.MarshalState()
	if err != nil {
		t.Fatal(err)
	}
	back, warnings, err := ParseBlobEntry(state)
	if err != nil || len(warnings) > 0 {
		t.Fatalf("saved state: error %v, warnings %q", err, warnings)
	}
	if diff := cmp.Diff(got, back); diff != "" {
		t.Errorf("entry after saving (-before +after):\n%s", diff)
	}
	return got.Image
}

// ownForm loads the file from a folder that has the secrets it names.
func ownForm(t *testing.T, file string) Image {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "secrets"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"config.toml":               string(readFile(t, file)),
		"secrets/auth":              "user:pass-marker\n",
		"secrets/token":             "token-marker\n",
		"secrets/access_key_secret": "secret-marker",
		"secrets/login":             "user:pass-marker",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := Load(filepath.Join(dir, "config.toml"))
	if err != nil {
		t.Fatal(err)
	}
	return c.Image
}

func TestKey(t *testing.T) {
	key := func(change func(*Registry)) string {
		b := formBackends()[TypeRegistry]
		b.Type = TypeRegistry
		r := *b.Registry
		b.Registry = &r
		change(&r)
		return b.Key()
	}
	was := key(func(*Registry) {})
	for name, c := range map[string]struct {
		same   bool
		change func(*Registry)
	}{
		"auth":          {true, func(r *Registry) { r.Auth = "b3RoZXI6b3RoZXI=" }},
		"token":         {true, func(r *Registry) { r.Token = "" }},
		"host":          {false, func(r *Registry) { r.Host = "other.example" }},
		"skip_verify":   {false, func(r *Registry) { r.SkipVerify = false }},
		"milliseconds":  {false, func(r *Registry) { r.Timeout += Duration(time.Millisecond) }},
		"proxy login":   {false, func(r *Registry) { r.Proxy.Login = "" }},
		"mirror header": {false, func(r *Registry) { r.Mirrors = []Mirror{{Headers: map[string]Secret{"A": "b"}}} }},
		"header":        {false, func(r *Registry) { r.Headers = map[string]Secret{"A": "b"} }},
	} {
		if got := key(c.change); (got == was) != c.same {
			t.Errorf("another %s: same key %v, want %v", name, got == was, c.same)
		}
	}
	if strings.Contains(was, "marker") {
		t.Errorf("the key %q holds a secret", was)
	}
}

func TestSameButCredentials(t *testing.T) {
	for kind, b := range formBackends() {
		b.Type = kind
		a, o := formImage(b), formImage(b.WithoutCredentials())
		if !a.SameButCredentials(o) {
			t.Errorf("%s: differs without credentials by more than those", kind)
		}
		if text, _ := json.Marshal(o.Backend.Registry); strings.Contains(string(text), "marker==") {
			t.Errorf("%s: still has a credential", kind)
		}
		o.WorkDir = "/elsewhere"
		if a.SameButCredentials(o) {
			t.Errorf("%s: another directory is not seen", kind)
		}
	}
}
