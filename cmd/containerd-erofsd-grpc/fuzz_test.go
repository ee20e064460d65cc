package main

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	nydus "github.com/erofsd/erofsd/internal/config"
	"github.com/erofsd/erofsd/internal/keychain"
)

// FuzzSplitReference takes any reference: it is refused, or its host and repository are parts
// of it that arrive at the daemon as they are.
func FuzzSplitReference(f *testing.F) {
	for _, reference := range []string{"registry.example:5000/a/b:1", "docker.io/library/debian@sha256:abc", "[::1]:5000/x", "a/b@c@d", "h/r:t:u", "\xff/x", "h/../x"} {
		f.Add(reference)
	}
	f.Fuzz(func(t *testing.T, reference string) {
		host, repo, err := splitReference(reference)
		if err != nil {
			if !errdefs.IsFailedPrecondition(err) || len(err.Error()) > 2000 {
				t.Errorf("%q: %v", reference, err)
			}
			return
		}
		if host == "" || repo == "" || !strings.HasPrefix(reference, host+"/"+repo) || strings.ContainsAny(host+repo, " \t\n?#%\\") {
			t.Fatalf("%q is %q and %q", reference, host, repo)
		}
		source, err := defaultConfig().source(func(context.Context, string) (keychain.Login, bool) { return keychain.Login{}, true })
		if err != nil {
			t.Fatal(err)
		}
		from, err := source(t.Context(), reference)
		if err != nil {
			t.Fatalf("%q: %v", reference, err)
		}
		image, _, err := nydus.ParseNydus(from.Config)
		if err != nil {
			return // the daemon refuses it
		}
		if r := image.Backend.Registry; r.Host != host || r.Repo != repo {
			t.Errorf("%q arrives as %q and %q", reference, r.Host, r.Repo)
		}
	})
}

// FuzzConfig reads any configuration: it is right, or an error; and never both.
func FuzzConfig(f *testing.F) {
	for _, text := range []string{
		"", "version = 1\n", "root = \"/x\"", "version = 1\n[daemon]\nfs_driver = \"fscache\"\n", "version = \"1\"", "version = 1\nroot = [[]]\n[log]\nlevel = 5", "[system]\npprof = \"unix:/x\"",
	} {
		f.Add(text, false)
		f.Add(text, true)
	}
	f.Fuzz(func(t *testing.T, text string, nydusName bool) {
		c, _, err := configOf(t, text, origin{nydusName: nydusName})
		if err == nil && c.validate() != nil {
			t.Errorf("%q is accepted: %v", text, c.validate())
		}
	})
}
