package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/keychain"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/snapshotter"
)

const secretText = "hunter2-not-for-anybody"

// TestCredentialsConfig is everything that is refused, and says so.
func TestCredentialsConfig(t *testing.T) {
	for text, want := range map[string]string{
		`[credentials]
providers = ["cri", "docker"]`: "",
		`[credentials]
providers = ["kubelet"]
kubelet = {config = "/c", plugins = "/p"}`: "",
		`[credentials]
providers = ["secrets"]
renew = "0s"
secrets = {namespaces = ["*"]}`: "",
		`[credentials]
providers = ["mine"]`: `"mine" is none of`,
		`[credentials]
providers = ["cri", "cri"]`: "there twice",
		`[credentials]
providers = ["kubelet"]`: "credentials.kubelet.config",
		`[credentials]
providers = ["kubelet"]
kubelet = {config = "/c", plugins = "p"}`: "credentials.kubelet.plugins",
		`[credentials]
providers = ["cri"]
cri = {address = "x"}`: "credentials.cri.address",
		`[credentials]
providers = ["secrets"]`: "credentials.secrets.namespaces",
		`[credentials]
providers = ["secrets"]
secrets = {namespaces = ["*", "a"]}`: "credentials.secrets.namespaces",
		`[credentials]
providers = ["secrets"]
secrets = {namespaces = ["a", "a"]}`: "credentials.secrets.namespaces",
		`[credentials]
providers = ["secrets"]
secrets = {namespaces = ["a"], kubeconfig = "k"}`: "credentials.secrets.kubeconfig",
		`[credentials]
renew = "1s"`: "credentials.renew",
		`[credentials]
renew = "soon"`: "credentials.renew",
		`[credentials]
password = "x"`: "password",
		`[[backends]]
hosts_dir = "/x"`: "backends, number 1: images",
		`[[backends]]
images = ["a.example"]
[[backends]]
images = ["https://b.example"]`: "backends, number 2: images",
		`[[backends]]
images = ["a.example"]
credentials = "mine"`: "backends, number 1: credentials",
		`[[backends]]
images = ["a.example"]
host = "b.example"`: "host",
	} {
		_, _, err := configOf(t, text, origin{})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s\n%v, want %q", text, err, want)
		}
	}
}

// TestKeyholder makes the providers that are wanted, in their order, or says why not.
func TestKeyholder(t *testing.T) {
	c := defaultCredentials()
	c.Providers = []string{fromCRI, fromKubelet}
	c.Kubelet = kubeletConfig{"/nowhere/config.yaml", "/nowhere"}
	if _, err := c.keyholder(slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "credentials provider kubelet") {
		t.Errorf("a configuration that is not there: %v", err)
	}
	c.Providers = []string{fromSecrets}
	c.Secrets = secretsConfig{"/nowhere/kubeconfig", []string{"*"}}
	if _, err := c.keyholder(slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "credentials provider secrets") {
		t.Errorf("a kubeconfig that is not there: %v", err)
	}
}

// TestLoginInConfig is what the daemon makes of logins, with and without a template.
func TestLoginInConfig(t *testing.T) {
	template := filepath.Join(t.TempDir(), "template.json")
	text := `{"version": 2, "backend": {"type": "registry", "registry": {"auth": "` + base64.StdEncoding.EncodeToString([]byte("own:template")) + `", "registry_token": "own-token", "blob_url_scheme": "https"}}}`
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		template, credentials string
		login                 keychain.Login
		auth, token, docker   string
	}{
		"none":                     {"", "", keychain.Login{}, "", "", ""},
		"none, docker":             {"", "docker", keychain.Login{}, "", "", "docker"},
		"password":                 {"", "docker", keychain.Login{Username: "anna", Password: "a:b"}, "anna:a:b", "", "docker"},
		"token":                    {"", "", keychain.Login{Password: "t"}, "", "t", ""},
		"docker's":                 {"", "", keychain.Login{Docker: true}, "", "", "docker"},
		"none, template":           {template, "", keychain.Login{}, "own:template", "own-token", ""},
		"password over template's": {template, "", keychain.Login{Username: "anna", Password: "a"}, "anna:a", "", ""},
		"token over template's":    {template, "", keychain.Login{Password: "t"}, "", "t", ""},
		"docker over template's":   {template, "", keychain.Login{Docker: true}, "", "", "docker"},
	} {
		r := imageOf(t, config{Backend: backendConfig{Template: c.template, Credentials: c.credentials}}, "r.example/app:1", c.login).Backend.Registry
		auth, err := base64.StdEncoding.DecodeString(r.Auth.Reveal())
		if err != nil || string(auth) != c.auth || r.Token.Reveal() != c.token || r.Credentials != c.docker {
			t.Errorf("%s: auth %q, token %q, credentials %q, %v", name, auth, r.Token.Reveal(), r.Credentials, err)
		}
	}
}

// TestBackends chooses by the reference, the first that means it.
func TestBackends(t *testing.T) {
	local := filepath.Join(t.TempDir(), "local.json")
	if err := os.WriteFile(local, []byte(`{"version": 2, "backend": {"type": "localfs", "localfs": {"dir": "/blobs"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c, _, err := configOf(t, `
[backend]
hosts_dir = "/others"
credentials = ""
[[backends]]
images = ["r.example/team/special"]
hosts_dir = "/special"
[[backends]]
images = ["r.example/team", "*.team.example:5000"]
hosts_dir = "/team"
plain_http = ["a.team.example:5000"]
skip_verify = true
ca_files = ["/ca.pem"]
credentials = ""
[[backends]]
images = ["local.example"]
template = "`+local+`"
`, origin{})
	if err != nil {
		t.Fatal(err)
	}
	for reference, want := range map[string]string{
		"r.example/team/special/app:1": "https /special docker false []",
		"r.example/team/app:1":         "https /team  true [/ca.pem]",
		"a.team.example:5000/app":      "http /team  true [/ca.pem]",
		"b.team.example:5000/app":      "https /team  true [/ca.pem]",
		"b.team.example/app":           "https /others  false []",
		"r.example/other@sha256:abc":   "https /others  false []",
		"docker.io/library/debian:12":  "https /others  false []",
		"local.example/whatever/app:1": "/blobs",
		"special.example/r.example/a":  "https /others  false []",
	} {
		b := imageOf(t, c, reference, keychain.Login{}).Backend
		got := ""
		if b.LocalFS != nil {
			got = b.LocalFS.Dir
		} else {
			r := b.Registry
			got = fmt.Sprint(r.Scheme, " ", r.HostsDir, " ", r.Credentials, " ", r.SkipVerify, " ", r.CAFiles)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", reference, got, want)
		}
	}
	c.Backends[1].Template = filepath.Join(t.TempDir(), "missing")
	if _, err := c.source(nil); err == nil || !strings.Contains(err.Error(), "backends, number 2") {
		t.Errorf("a template that is not there: %v", err)
	}
}

// TestOrigin hands on what is known of a login, and asks for none where none is needed.
func TestOrigin(t *testing.T) {
	asked := 0
	source, err := config{}.source(func(context.Context, string) (keychain.Login, bool) {
		asked++
		return keychain.Login{}, false
	})
	if err != nil {
		t.Fatal(err)
	}
	o, err := source(t.Context(), "r.example/app:1")
	if err != nil || o.Login || !o.Unsure || asked != 1 {
		t.Errorf("%+v, %v after %d questions", o, err, asked)
	}
	if _, err := source(t.Context(), ""); err == nil || asked != 1 {
		t.Errorf("an image without a reference: %v after %d questions", err, asked)
	}
}

// imageService is the CRI's, of which one call is known.
type imageService struct {
	cri.UnimplementedImageServiceServer
}

func (imageService) PullImage(_ context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	return &cri.PullImageResponse{ImageRef: r.Image.GetImage()}, nil
}

// TestOneSocket is containerd's and the kubelet's at once.
func TestOneSocket(t *testing.T) {
	dir := t.TempDir()
	behind := grpc.NewServer()
	cri.RegisterImageServiceServer(behind, imageService{})
	l, err := net.Listen("unix", filepath.Join(dir, "cri"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 2)
	go func() { served <- behind.Serve(l) }()
	log := &testenv.Buffer{}
	c := defaultCredentials()
	c.Providers, c.CRI.Address = []string{fromCRI}, filepath.Join(dir, "cri")
	keys, err := c.keyholder(slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	source, err := defaultConfig().source(keys.Login)
	if err != nil {
		t.Fatal(err)
	}
	sn, err := snapshotter.New(filepath.Join(dir, "root"), nil, source)
	if err != nil {
		t.Fatal(err)
	}
	at := defaultConfig()
	at.Address = filepath.Join(dir, "s")
	s, err := listen(at, nil, sn, keys.serverOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { served <- s.serve(ctx) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		err := conn.Close()
		cancel()
		behind.Stop()
		if err := errors.Join(err, <-served, <-served, sn.Close(), keys.close()); err != nil {
			t.Error(err)
		}
	}()
	auth := &cri.AuthConfig{Username: "anna", Password: secretText}
	r, err := cri.NewImageServiceClient(conn).PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "r.example/app:1"}, Auth: auth})
	if err != nil || r.ImageRef != "r.example/app:1" {
		t.Errorf("pull: %v, %v", r, err)
	}
	if _, err := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "erofsd").Prepare(t.Context(), "a", ""); err != nil {
		t.Errorf("prepare: %v", err)
	}
	if err := conn.Invoke(t.Context(), "/unknown.Service/Call", &cri.VersionRequest{}, &cri.VersionResponse{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("an unknown call: %v", err)
	}
	o, err := source(t.Context(), "r.example/app:1")
	if err != nil || !o.Login || !strings.Contains(string(o.Config), base64.StdEncoding.EncodeToString([]byte("anna:"+secretText))) {
		t.Errorf("the login does not reach the daemon: %v", err)
	}
	if o, err := source(t.Context(), "s.example/app:1"); err != nil || o.Login || !o.Unsure {
		t.Errorf("another registry: login %v, unsure %v, %v", o.Login, o.Unsure, err)
	}
	if !json.Valid(o.Config) || strings.Contains(log.String(), "hunter2") {
		t.Errorf("log: %s", log)
	}
}

// TestDaemonAwaited: what is asked first for an image waits for a daemon.
func TestDaemonAwaited(t *testing.T) {
	d := newDaemon(daemonConfig{Socket: filepath.Join(t.TempDir(), "s")}, slog.New(slog.DiscardHandler), func(string) {})
	defer d.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.BindImage(ctx, api.BindRequest{}); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "ask daemon") {
		t.Errorf("bind: %v", err)
	}
	if _, err := d.Status(ctx); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "ask daemon") {
		t.Errorf("status: %v", err)
	}
}
