package registry

import (
	"context"
	"fmt"
	"os"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"

	"github.com/erofsd/erofsd/backend"
)

// DockerCredentials returns an Options.Credential that looks into docker's
// configuration ($DOCKER_CONFIG or ~/.docker/config.json) and its credential
// helpers. It reads them anew each time, so a later login counts; nothing is kept.
// A missing configuration means anonymous.
func DockerCredentials() func(ctx context.Context, host string) (auth.Credential, error) {
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
