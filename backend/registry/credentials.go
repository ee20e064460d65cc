package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"

	"github.com/erofsd/erofsd/backend"
)

// DockerCredentials returns an Options.Credential that looks into docker's
// configuration ($DOCKER_CONFIG or ~/.docker/config.json) and its credential
// helpers. It reads them anew each time, so a later login counts; nothing is kept.
// A missing configuration means anonymous.
func DockerCredentials() CredentialFunc {
	return func(ctx context.Context, host string) (auth.Credential, error) {
		if os.Getenv("DOCKER_CONFIG") == "" && os.Getenv("HOME") == "" {
			return auth.EmptyCredential, nil // a system service
		}
		store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
		if err != nil {
			return auth.EmptyCredential, fmt.Errorf("read docker's configuration: %w", backend.RedactError(err))
		}
		c, err := credentials.Credential(store)(ctx, host)
		if err != nil {
			return auth.EmptyCredential, fmt.Errorf("login for %s from docker's configuration: %w", host, backend.RedactError(err))
		}
		return c, nil
	}
}

// StaticCredential returns an Options.Credential with one login for one registry, host or
// host:port. userPassword is the base64 of user:password, as in docker's and nydus's
// configuration; the error does not repeat it.
func StaticCredential(host, userPassword string) (CredentialFunc, error) {
	p, err := base64.StdEncoding.DecodeString(userPassword)
	user, password, ok := strings.Cut(string(p), ":")
	if err != nil || !ok || user == "" {
		return nil, errors.New("login for " + host + " is not the base64 of user:password")
	}
	return auth.StaticCredential(host, auth.Credential{Username: user, Password: password}), nil
}

// TokenCredential returns an Options.Credential with a bearer token for one registry, used
// until it is refused, and then what next gives; next may be nil.
func TokenCredential(host, token string, next CredentialFunc) CredentialFunc {
	own := auth.StaticCredential(host, auth.Credential{AccessToken: token})
	return func(ctx context.Context, asked string) (auth.Credential, error) {
		c, err := own(ctx, asked)
		if err != nil || next == nil {
			return c, err
		}
		other, err := next(ctx, asked)
		if err != nil {
			return auth.EmptyCredential, err
		}
		other.AccessToken = c.AccessToken
		return other, nil
	}
}
