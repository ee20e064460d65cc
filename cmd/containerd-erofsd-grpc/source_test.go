package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	nydus "github.com/erofsd/erofsd/internal/config"
	"github.com/erofsd/erofsd/internal/keychain"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestSplitReference(t *testing.T) {
	for reference, want := range map[string][2]string{
		"registry.example/team/app:1":                    {"registry.example", "team/app"},
		"registry.example:5000/app":                      {"registry.example:5000", "app"},
		"localhost:5000/a/b/c:v1@sha256:" + "0123456789": {"localhost:5000", "a/b/c"},
		"docker.io/library/debian@sha256:abc":            {"docker.io", "library/debian"},
		"":                                               {},
		"debian":                                         {},
		"/app":                                           {},
		"registry.example/":                              {},
		"registry.example/a b":                           {},
		"registry.example/a?x=y":                         {},
		"registry.example/:1":                            {},
	} {
		host, repo, err := splitReference(reference)
		if want[0] == "" {
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%q: %s, %s, %v", reference, host, repo, err)
			}
			continue
		}
		if err != nil || host != want[0] || repo != want[1] {
			t.Errorf("%q: %s, %s, %v; want %q", reference, host, repo, err, want)
		}
	}
}

// imageOf is what the daemon makes of a source.
func imageOf(t *testing.T, c config, reference string, l keychain.Login) nydus.Image {
	t.Helper()
	source, err := c.source(func(context.Context, string) (keychain.Login, bool) { return l, true })
	if err != nil {
		t.Fatal(err)
	}
	origin, err := source(t.Context(), reference)
	if err != nil {
		t.Fatal(err)
	}
	image, warnings, err := nydus.ParseNydus(origin.Config)
	if err != nil || len(warnings) > 0 {
		t.Fatalf("%s: warnings %q, error %v", origin.Config, warnings, err)
	}
	return image
}

// TestSource gives the daemon what the configuration says.
func TestSource(t *testing.T) {
	c := backendConfig{
		Credentials: "docker", HostsDir: "/etc/certs.d", PlainHTTP: []string{"plain.example:5000"}, SkipVerify: true, CAFiles: []string{"/ca.pem"},
	}
	got := imageOf(t, config{Backend: c}, "registry.example/team/app:1", keychain.Login{}).Backend.Registry
	want := &nydus.Registry{HTTP: got.HTTP, Scheme: "https", Host: "registry.example", Repo: "team/app", Credentials: "docker", HostsDir: "/etc/certs.d"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("registry (-want +got):\n%s", diff)
	}
	if !got.SkipVerify || len(got.CAFiles) != 1 || got.CAFiles[0] != "/ca.pem" {
		t.Errorf("TLS: %+v", got.HTTP)
	}
	if got := imageOf(t, config{Backend: c}, "plain.example:5000/app", keychain.Login{}).Backend.Registry.Scheme; got != "http" {
		t.Errorf("scheme %q, want http", got)
	}
}

// TestTemplates are nydus's own samples.
func TestTemplates(t *testing.T) {
	sample := filepath.Join(testenv.ModuleRoot(t), "configs", "nydusd-config.json")
	image := imageOf(t, config{Backend: backendConfig{Template: sample, Credentials: "docker"}}, "registry.example/team/app:1", keychain.Login{})
	r := image.Backend.Registry
	if r.Host != "registry.example" || r.Repo != "team/app" || r.Proxy.URL == "" || *r.RetryLimit != 4 {
		t.Errorf("registry %+v", r)
	}
	if p := image.Prefetch; p.Enable == nil || !*p.Enable || p.Threads != 8 || !p.All {
		t.Errorf("prefetch %+v", p)
	}
	local := filepath.Join(t.TempDir(), "local.json")
	for text, ok := range map[string]bool{
		`{"version": 2, "backend": {"type": "localfs", "localfs": {"dir": "/blobs"}}}`: true,
		`{"version": 2}`: false,
		`not json`:       false,
	} {
		if err := os.WriteFile(local, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c := config{Backend: backendConfig{Template: local}}
		if !ok {
			if _, err := c.source(nil); err == nil {
				t.Errorf("%s is accepted", text)
			}
			continue
		}
		if got := imageOf(t, c, "", keychain.Login{}); got.Backend.LocalFS == nil || got.Backend.LocalFS.Dir != "/blobs" {
			t.Errorf("%s: %+v", text, got.Backend)
		}
	}
}
