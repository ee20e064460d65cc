package keychain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const secretText = "hunter2-not-for-logs"

// A fixed provider has one answer.
type fixed struct {
	login   Login
	err     error
	asked   int
	refused []string
}

func (*fixed) Name() string { return "fixed" }

func (f *fixed) Login(context.Context, string) (Login, error) {
	f.asked++
	return f.login, f.err
}

func (f *fixed) Refused(image string) { f.refused = append(f.refused, image) }

func TestChain(t *testing.T) {
	login := Login{Username: "anna", Password: secretText}
	other := Login{Username: "bert", Password: "other"}
	failure := errors.New("the API is down")
	for name, c := range map[string]struct {
		providers []*fixed
		want      Login
		sure      bool
		asked     int
		log       string
	}{
		"nobody":           {nil, Login{}, true, 0, ""},
		"first":            {[]*fixed{{login: login}, {login: other}}, login, true, 1, ""},
		"second":           {[]*fixed{{}, {login: other}}, other, true, 2, ""},
		"none":             {[]*fixed{{}, {}}, Login{}, true, 2, ""},
		"failure, then":    {[]*fixed{{err: failure}, {login: other}}, other, true, 2, "the API is down"},
		"failure":          {[]*fixed{{err: failure}, {}}, Login{}, false, 2, "the API is down"},
		"forgotten":        {[]*fixed{{err: ErrForgotten}, {}}, Login{}, false, 2, ""},
		"forgotten, later": {[]*fixed{{err: ErrForgotten}, {login: other}}, other, true, 2, ""},
		"docker":           {[]*fixed{{login: Login{Docker: true}}, {login: other}}, Login{Docker: true}, true, 1, ""},
	} {
		var log testenv.Buffer
		chain := New(slog.New(slog.NewTextHandler(&log, nil)))
		for _, p := range c.providers {
			chain.providers = append(chain.providers, p)
		}
		got, sure := chain.Login(t.Context(), "r.example/app:1")
		asked := 0
		for _, p := range c.providers {
			asked += p.asked
		}
		if got != c.want || sure != c.sure || asked != c.asked {
			t.Errorf("%s: user %q, sure %v after %d questions; want %q, %v, %d", name, got.Username, sure, asked, c.want.Username, c.sure, c.asked)
		}
		if text := log.String(); (text == "") != (c.log == "") || !strings.Contains(text, c.log) {
			t.Errorf("%s: logged %q, want %q", name, text, c.log)
		}
		chain.Refused("r.example/app:1")
		for _, p := range c.providers {
			if len(p.refused) != 1 {
				t.Errorf("%s: a provider heard of %q", name, p.refused)
			}
		}
	}
}

// TestLoginIsSecret prints a login in all ways that come to mind.
func TestLoginIsSecret(t *testing.T) {
	l := Login{Username: "anna-secret", Password: secretText}
	var log testenv.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("text", "login", l, "pointer", &l, "group", []Login{l})
	slog.New(slog.NewJSONHandler(&log, nil)).Info("json", "login", l, "pointer", &l, "in", struct{ L Login }{l})
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&log, verb+verb+verb, l, &l, struct{ L Login }{l})
	}
	p, err := json.Marshal(map[string]any{"l": l})
	fmt.Fprintln(&log, string(p), err)
	text := log.String()
	if strings.Contains(text, "secret") || strings.Contains(text, "hunter2") || strings.Contains(text, fmt.Sprintf("%x", "hunter2")) {
		t.Errorf("printed: %s", text)
	}
	if !strings.Contains(text, "[login]") {
		t.Errorf("nothing was printed: %s", text)
	}
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern string
		images  string // that match
		others  string
	}{
		{"r.example", "r.example/app r.example/team/app:1 R.example/app@sha256:00", "r.example:5000/app a.r.example/app example/app"},
		{"r.example:5000", "r.example:5000/app:1", "r.example/app r.example:5001/app"},
		{"*.example", "r.example/app s.example/x/y:1", "a.r.example/app example/app r.example:80/app"},
		{"*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu.amazonaws.com/app", "dkr.ecr.eu.amazonaws.com/app 1.dkr.ecr.eu.amazonaws.com.cn/app"},
		{"r.example/team", "r.example/team/app:1 r.example/team:1 r.example/team2/app", "r.example/other/team"},
		{"reg*.io", "registry.io/a", "foo.io/a registry.io.x/a"},
		{"docker.io", "docker.io/library/debian:12 index.docker.io/a/b", "r.example/docker.io"},
		{"index.docker.io", "docker.io/library/debian:12", "index.docker.example/a"},
		{"127.0.0.1:5000", "127.0.0.1:5000/app", "127.0.0.2:5000/app"},
	} {
		p, err := ParsePattern(c.pattern)
		if err != nil {
			t.Errorf("%q: %v", c.pattern, err)
			continue
		}
		for want, images := range map[bool]string{true: c.images, false: c.others} {
			for _, image := range strings.Fields(images) {
				if got := p.Match(image); got != want {
					t.Errorf("%q and %q: %v, want %v", c.pattern, image, got, want)
				}
			}
		}
	}
	for _, bad := range []string{"", "https://r.example", "r..example", "r.example/app@sha256:1", "r example", "[", "a[.example", ".example", strings.Repeat("a", maxPattern+1)} {
		if _, err := ParsePattern(bad); err == nil {
			t.Errorf("%.30q is accepted", bad)
		}
	}
}

func FuzzPattern(f *testing.F) {
	f.Add("*.example:5000/a", "r.example:5000/app:1")
	f.Add("[a-z]*.io/", "x.io@")
	f.Fuzz(func(_ *testing.T, pattern, image string) {
		if p, err := ParsePattern(pattern); err == nil {
			p.Match(image)
		}
	})
}

// TestDockerConfig is docker's file as secrets have it.
func TestDockerConfig(t *testing.T) {
	ring, err := parseDockerConfig([]byte(`{"auths": {
		"https://index.docker.io/v1/": {"auth": "aHViOnBhc3M6d29yZA=="},
		"r.example": {"username": "anna", "password": "1"},
		"r.example/team": {"username": "bert", "password": "2"},
		"*.example": {"username": "any", "password": "3"},
		"token.example": {"password": "a-token"},
		"identity.example": {"identitytoken": "x"},
		"broken.example": {"auth": "%%%"},
		"not a host": {"username": "a", "password": "b"}
	}}`))
	if err != nil {
		t.Fatal(err)
	}
	for image, want := range map[string]string{
		"docker.io/library/debian:12": "hub:pass:word", "r.example/app": "anna:1", "r.example/team/app": "bert:2",
		"s.example/app": "any:3", "token.example/app": ":a-token", "identity.example/app": "any:3", "other.org/app": "none",
	} {
		got := "none"
		if k, ok := ring.find(image); ok {
			got = k.login.Username + ":" + k.login.Password
		}
		if got != want {
			t.Errorf("%s: %s, want %s", image, got, want)
		}
	}
	_, err = parseDockerConfig([]byte(`{"auths": {"r.example": {"password": "` + secretText))
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("broken: %v", err)
	}
	many := map[string]any{}
	for i := range maxKeys + 1 {
		many[fmt.Sprintf("r%d.example", i)] = dockerAuth{"a", "b", ""}
	}
	p, err := json.Marshal(map[string]any{"auths": many})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseDockerConfig(p); err == nil {
		t.Error("any number of logins is accepted")
	}
}

// TestDocker finds docker's logins, and copies none unless it is asked to.
func TestDocker(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	helper := "#!/bin/sh\nread host\n[ \"$host\" = helper.example ] || { echo 'credentials not found in native keychain'; exit 1; }\n" +
		`echo '{"ServerURL": "helper.example", "Username": "<token>", "Secret": "` + secretText + `"}'`
	config := `{"auths": {"https://index.docker.io/v1/": {"auth": "aHViOng="}, "r.example:5000": {"auth": "YTpi"}}, "credHelpers": {"helper.example": "test", "none.example": "test"}}`
	for name, text := range map[string]string{"config.json": config, "docker-credential-test": helper} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for image, want := range map[string]bool{
		"r.example:5000/app:1": true, "r.example/app:1": false, "docker.io/library/debian:12": true, "helper.example/app": true, "none.example/app": false,
	} {
		if l, err := (Docker{}).Login(t.Context(), image); err != nil || l != (Login{Docker: want}) {
			t.Errorf("%s: docker %v, error %v; want %v", image, l.Docker, err, want)
		}
	}
	for host, want := range map[string]Login{
		"r.example:5000": {Username: "a", Password: "b"}, "r.example": {}, "docker.io": {Username: "hub", Password: "x"}, "helper.example": {},
	} {
		if l, err := (Docker{}).Copy(t.Context(), host); err != nil || l != want {
			t.Errorf("%s: a copy as %q with %d bytes, error %v", host, l.Username, len(l.Password), err)
		}
	}
}
