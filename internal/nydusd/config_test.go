package nydusd

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
)

// docker has a login for one registry.
func docker(_ context.Context, host string) (auth, token string, err error) {
	switch host {
	case "login.example":
		return "YTpi", "", nil
	case "token.example":
		return "", "t", nil
	case "broken.example":
		return "", "", errors.New("no helper")
	}
	return "", "", nil
}

// TestOrigin reads both forms of nydus's configuration, and leaves nothing to nydusd that only
// erofsd understands.
func TestOrigin(t *testing.T) {
	const prefetchOff = `{"enable":false,"threads_count":8,"merging_size":1048576,"bandwidth_rate":0,"prefetch_all":false}`
	for name, c := range map[string]struct{ config, kind, backend, prefetch string }{
		"v2": {
			`{"version":2,"backend":{"type":"registry","registry":{"host":"r.example","repo":"a","credentials":"docker","hosts_dir":"/h","scheme":"http"}},"cache":{}}`,
			"registry", `{"host":"r.example","repo":"a","scheme":"http"}`, prefetchOff,
		},
		"v1": {
			`{"device":{"backend":{"type":"localfs","config":{"dir":"/b"}},"cache":{"type":"blobcache"}},"mode":"direct","fs_prefetch":{"enable":true,"threads_count":3}}`,
			"localfs", `{"dir":"/b"}`, `{"enable":true,"threads_count":3,"merging_size":1048576,"bandwidth_rate":0,"prefetch_all":false}`,
		},
		"v2 prefetch": {
			`{"version":2,"backend":{"type":"s3","s3":{"region":"x"}},"cache":{"prefetch":{"enable":true,"threads":2,"batch_size":4096,"bandwidth_limit":9,"prefetch_all":true}}}`,
			"s3", `{"region":"x"}`, `{"enable":true,"threads_count":2,"merging_size":4096,"bandwidth_rate":9,"prefetch_all":true}`,
		},
		"docker's login": {
			`{"backend":{"type":"registry","registry":{"host":"login.example","credentials":"docker"}}}`, "registry", `{"auth":"YTpi","host":"login.example"}`, prefetchOff,
		},
		"docker's token": {
			`{"backend":{"type":"registry","registry":{"host":"token.example","credentials":"docker"}}}`, "registry", `{"host":"token.example","registry_token":"t"}`, prefetchOff,
		},
		"docker is not asked": {
			`{"backend":{"type":"registry","registry":{"host":"login.example"}}}`, "registry", `{"host":"login.example"}`, prefetchOff,
		},
		"another login": {
			`{"backend":{"type":"registry","registry":{"host":"login.example","credentials":"docker","auth":"eDp5"}}}`, "registry", `{"auth":"eDp5","host":"login.example"}`, prefetchOff,
		},
		"Docker Hub": {
			`{"backend":{"type":"registry","registry":{"host":"docker.io","repo":"library/a"}}}`, "registry", `{"host":"index.docker.io","repo":"library/a"}`, prefetchOff,
		},
	} {
		t.Run(name, func(t *testing.T) {
			o, err := parseOrigin([]byte(c.config))
			if err == nil {
				err = o.settle(t.Context(), docker)
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := text(t, o.backend); o.kind != c.kind || got != c.backend {
				t.Errorf("backend %s %s, want %s %s", o.kind, got, c.kind, c.backend)
			}
			if got := text(t, o.prefetch); got != c.prefetch {
				t.Errorf("prefetch %s, want %s", got, c.prefetch)
			}
		})
	}
}

// TestBadOrigin refuses what nydusd would not take, and repeats nothing of it.
func TestBadOrigin(t *testing.T) {
	for _, config := range []string{``, `"secret"`, `{"backend":{"type":"secret"}}`, `{"device":{"backend":{"config":{"auth":"secret"}}}}`, `[secret`} {
		_, err := parseOrigin([]byte(config))
		var refusal *api.Error
		if !errors.As(err, &refusal) || refusal.Status != 400 || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", config, err)
		}
	}
	o, err := parseOrigin([]byte(`{"backend":{"type":"registry","registry":{"host":"broken.example","credentials":"docker"}}}`))
	if err == nil {
		err = o.settle(t.Context(), docker)
	}
	if err == nil || !strings.Contains(err.Error(), "broken.example") {
		t.Errorf("docker's helper fails: %v", err)
	}
}

// TestEntry has what nydus-snapshotter sends.
func TestEntry(t *testing.T) {
	o := origin{kind: "localfs", backend: object{"dir": "/b"}}
	i := image{FSID: "f", Domain: "d"}
	want := `{"config":{"backend_config":{"dir":"/b"},"backend_type":"localfs","cache_config":{"work_dir":"/w"},"cache_type":"fscache","id":"f","metadata_path":"/boot"},` +
		`"domain_id":"d","id":"f","type":"bootstrap"}`
	if got := text(t, o.entry(i, "/boot", "/w")); got != want {
		t.Errorf("entry %s, want %s", got, want)
	}
	o.prefetch.Enable = true
	if got := text(t, o.entry(i, "/boot", "/w")); !strings.Contains(got, `"prefetch_config":{"enable":true,`) {
		t.Errorf("with prefetch %s", got)
	}
}

func text(t *testing.T, v any) string {
	t.Helper()
	p, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(p)
}
