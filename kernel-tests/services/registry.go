package services

import (
	"cmp"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/kernel-tests/debian"
)

// The login that registries with one want, and the token service.
const (
	User     = "reader"
	Password = "open-sesame-4711"
	// passwords is the line of htpasswd.
	passwords = User + ":$2y$04$Cw8R2hLgKY31qxseZAGqpeytPORXVHPnQRtNCZ6vbvg1BjBp8H7Zu\n"
)

// Auth is the login as nydus's and docker's configurations have it.
func Auth() string { return base64.StdEncoding.EncodeToString([]byte(User + ":" + Password)) }

// RegistryOptions say how a docker-registry runs; with none it has no content and
// anybody may read and write.
type RegistryOptions struct {
	Dir      string       // of content, which registries may share; "": a new one
	Login    bool         // wants User and Password
	Token    *TokenServer // wants its tokens
	TLS      *CA          // speaks TLS with a certificate of its
	Upstream string       // URL of the registry that it is a pull-through mirror of
}

type object = map[string]any

// Registry starts Debian's docker-registry.
func Registry(t testing.TB, o RegistryOptions) *Process {
	t.Helper()
	program := need(t, debian.DockerRegistry)
	dir := scratch(t)
	addr := FreeAddr(t)
	server := object{"addr": addr}
	config := object{
		"version": "0.1", "log": object{"level": "warn", "accesslog": object{"disabled": true}}, "http": server,
		"storage": object{"filesystem": object{"rootdirectory": cmp.Or(o.Dir, filepath.Join(dir, "content"))}},
	}
	if o.Login {
		file := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(file, []byte(passwords), 0o600); err != nil {
			t.Fatal(err)
		}
		config["auth"] = object{"htpasswd": object{"realm": "tests", "path": file}}
	}
	if s := o.Token; s != nil {
		config["auth"] = object{"token": object{"realm": s.URL + "/token", "service": tokenService, "issuer": tokenIssuer, "rootcertbundle": s.cert}}
	}
	if o.Upstream != "" {
		config["proxy"] = object{"remoteurl": o.Upstream}
	}
	scheme := "http"
	if o.TLS != nil {
		scheme = "https"
		cert, key := o.TLS.Server(t)
		server["tls"] = object{"certificate": cert, "key": key}
	}
	text, err := json.Marshal(config) // which YAML is a superset of
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	// Whether its certificate is right is not the question here.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	return launch(t, addr, answers(client, scheme+"://"+addr+"/v2/"), program, "serve", file)
}
