package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/erofsd/erofsd/internal/keychain"
	"github.com/erofsd/erofsd/snapshotter"
)

// credentialsConfig says where logins for registries come from.
type credentialsConfig struct {
	Providers []string      `toml:"providers"`
	Renew     string        `toml:"renew"`
	CRI       criConfig     `toml:"cri"`
	Kubelet   kubeletConfig `toml:"kubelet"`
	Secrets   secretsConfig `toml:"secrets"`
}

type criConfig struct {
	Address string `toml:"address"`
}

type kubeletConfig struct {
	Config  string `toml:"config"`
	Plugins string `toml:"plugins"`
}

type secretsConfig struct {
	Kubeconfig string   `toml:"kubeconfig"`
	Namespaces []string `toml:"namespaces"`
}

// The providers of credentialsConfig.
const (
	fromCRI     = "cri"
	fromDocker  = "docker"
	fromKubelet = "kubelet"
	fromSecrets = "secrets"
)

func defaultCredentials() credentialsConfig {
	return credentialsConfig{
		Providers: []string{}, Renew: "5m",
		CRI:     criConfig{Address: "/run/containerd/containerd.sock"},
		Secrets: secretsConfig{Namespaces: []string{}},
	}
}

// check returns all that is wrong.
func (c credentialsConfig) check() (errs []error) {
	find := func(wrong bool, format string, args ...any) {
		if wrong {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for i, name := range c.Providers {
		find(!slices.Contains([]string{fromCRI, fromDocker, fromKubelet, fromSecrets}, name), "credentials.providers: %q is none of cri, docker, kubelet, secrets", name)
		find(slices.Contains(c.Providers[:i], name), "credentials.providers: %q is there twice", name)
	}
	path := func(provider, key, name string) {
		find(slices.Contains(c.Providers, provider) && !filepath.IsAbs(name), "credentials.%s: %q is no absolute path, which provider %s needs", key, name, provider)
	}
	path(fromCRI, "cri.address", c.CRI.Address)
	path(fromKubelet, "kubelet.config", c.Kubelet.Config)
	path(fromKubelet, "kubelet.plugins", c.Kubelet.Plugins)
	if c.Secrets.Kubeconfig != "" {
		path(fromSecrets, "secrets.kubeconfig", c.Secrets.Kubeconfig)
	}
	find(slices.Contains(c.Providers, fromSecrets) && len(c.Secrets.Namespaces) == 0,
		`credentials.secrets.namespaces: name those whose secrets may be used for every image, or ["*"]`)
	for i, n := range c.Secrets.Namespaces {
		find(n == "" || strings.ContainsAny(n, "/ ") || n == "*" && len(c.Secrets.Namespaces) > 1 || slices.Contains(c.Secrets.Namespaces[:i], n),
			"credentials.secrets.namespaces: %q is no namespace, is there twice, or is not alone", n)
	}
	_, err := c.renew()
	find(err != nil, "credentials.renew: %q is no duration of at least 10s, nor 0s", c.Renew)
	return errs
}

// lookPause is how often the daemon is asked whether a login is refused.
const lookPause = 2 * time.Second

// minRenew is the shortest pause between renewals of all logins.
const minRenew = 10 * time.Second

// renew is the pause between renewals; 0: none but those that are needed.
func (c credentialsConfig) renew() (time.Duration, error) {
	d, err := time.ParseDuration(c.Renew)
	if err == nil && d != 0 && d < minRenew {
		err = errors.New("too short")
	}
	return d, err
}

// A keyholder knows logins, and has what its providers need.
type keyholder struct {
	*keychain.Chain
	changed chan struct{}
	every   time.Duration
	cri     *keychain.CRI     // nil: none
	secrets *keychain.Secrets // nil: none

	stop    context.CancelFunc
	running sync.WaitGroup
}

// keyholder returns the logins that c says. It follows secrets until it is closed.
func (c credentialsConfig) keyholder(log *slog.Logger) (k *keyholder, err error) {
	k = &keyholder{changed: make(chan struct{}, 1)}
	if k.every, err = c.renew(); err != nil {
		return nil, fmt.Errorf("credentials.renew: %w", err)
	}
	var providers []keychain.Provider
	for _, name := range c.Providers {
		var p keychain.Provider = keychain.Docker{}
		switch name {
		case fromCRI:
			k.cri, err = keychain.NewCRI(c.CRI.Address, k.changed)
			p = k.cri
		case fromKubelet:
			p, err = keychain.NewKubelet(c.Kubelet.Config, c.Kubelet.Plugins)
		case fromSecrets:
			k.secrets, err = keychain.NewSecrets(c.Secrets.Kubeconfig, c.Secrets.Namespaces, k.changed, log)
			p = k.secrets
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("credentials provider %s: %w", name, err), k.closeCRI())
		}
		providers = append(providers, p)
	}
	k.Chain = keychain.New(log, providers...)
	var ctx context.Context
	ctx, k.stop = context.WithCancel(context.Background())
	if k.secrets != nil {
		k.running.Go(func() { k.secrets.Run(ctx) })
	}
	return k, nil
}

// close ends what goes on.
func (k *keyholder) close() error {
	k.stop()
	k.running.Wait()
	return k.closeCRI()
}

func (k *keyholder) closeCRI() error {
	if k.cri == nil {
		return nil
	}
	return k.cri.Close()
}

// serverOptions make the snapshotter's socket that of the CRI image service too.
func (k *keyholder) serverOptions() []grpc.ServerOption {
	if k.cri == nil {
		return nil
	}
	return k.cri.ServerOptions()
}

// renewal is how the daemon's logins are kept fresh.
func (k *keyholder) renewal() snapshotter.Renewal {
	return snapshotter.Renewal{Look: lookPause, Every: k.every, Changed: k.changed, Refused: k.Refused}
}
