package keychain

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"

	"github.com/erofsd/erofsd/backend/registry"
)

// Docker is docker's configuration and its credential helpers, of the user of this process.
// It only says whether they have a login: erofsd asks them itself whenever it needs it, so
// that a later login counts, and identity tokens and logins for mirrors do as well.
type Docker struct{}

// Name is "docker".
func (Docker) Name() string { return "docker" }

// Login says whether there is one.
func (Docker) Login(ctx context.Context, image string) (Login, error) {
	c, err := registry.DockerCredentials()(ctx, dockerHost(Host(image)))
	if err != nil {
		return Login{}, err
	}
	return Login{Docker: c.Password != "" || c.RefreshToken != "" || c.AccessToken != ""}, nil
}

// Copy returns the login for a registry as it is now, for who cannot ask docker. An identity
// token is none: it has to be traded at the registry first.
func (Docker) Copy(ctx context.Context, host string) (Login, error) {
	c, err := registry.DockerCredentials()(ctx, dockerHost(host))
	if err != nil || c.Password == "" {
		return Login{Password: c.AccessToken}, err
	}
	return Login{Username: c.Username, Password: c.Password}, nil
}

// dockerHost is the name by which docker's entry of a registry is found.
func dockerHost(host string) string {
	if host == "docker.io" {
		return "registry-1.docker.io"
	}
	return host
}

// Refused does nothing: nothing is kept.
func (Docker) Refused(string) {}

// dockerAuth is an entry of docker's configuration.
type dockerAuth struct {
	Username string `json:"username"`
	Password string `json:"password"`
	Auth     string `json:"auth"` // base64 of user:password
}

// login reads an entry.
func (a dockerAuth) login() (Login, bool) {
	l := Login{Username: a.Username, Password: a.Password}
	if a.Auth != "" {
		var ok bool
		if l.Username, l.Password, ok = splitAuth(a.Auth); !ok {
			return Login{}, false
		}
	}
	return l, !l.Empty()
}

// splitAuth reads the base64 of user:password.
func splitAuth(auth string) (user, password string, ok bool) {
	p, err := base64.StdEncoding.DecodeString(auth)
	if err != nil {
		return "", "", false
	}
	user, password, ok = strings.Cut(string(p), ":")
	return user, strings.TrimRight(password, "\x00"), ok
}

// parseDockerConfig reads the logins in docker's config.json. Its error has nothing of p.
// Entries that are no user and password for a registry are passed over.
func parseDockerConfig(p []byte) (keyring, error) {
	var c struct {
		Auths map[string]dockerAuth `json:"auths"`
	}
	if err := json.Unmarshal(p, &c); err != nil {
		return nil, errors.New("it is not docker's config.json")
	}
	if len(c.Auths) > maxKeys {
		return nil, errKeys
	}
	var ring keyring
	for address, a := range c.Auths {
		login, ok := a.login()
		pattern, err := ParsePattern(dockerAddress(address))
		if ok && err == nil {
			ring = append(ring, key{pattern, login})
		}
	}
	return ring.sorted(), nil
}

// dockerAddress makes a pattern of docker's key of a registry: a host, or a URL that may end
// in the API's version.
func dockerAddress(address string) string {
	for _, scheme := range []string{"https://", "http://"} {
		address = strings.TrimPrefix(address, scheme)
	}
	address = strings.TrimSuffix(address, "/")
	for _, version := range []string{"/v1", "/v2"} {
		address = strings.TrimSuffix(address, version)
	}
	return address
}
