package keychain

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sync/singleflight"
)

const (
	maxKubeletConfig = 1 << 20 // bytes
	maxPlugins       = 64
	maxRunning       = 8    // plugins at the same time
	maxCached        = 1024 // answers
)

// Kubelet has the kubelet's credential provider plugins run: programs that are asked with
// JSON for the logins for an image.
type Kubelet struct {
	plugins []plugin
	running chan struct{} // has a place for each that runs
	flights singleflight.Group

	// mu guards cached.
	mu     sync.Mutex
	cached map[cacheKey]answer
}

// kubeletConfig is a CredentialProviderConfig of the kubelet.
type kubeletConfig struct {
	APIVersion string            `yaml:"apiVersion"`
	Kind       string            `yaml:"kind"`
	Providers  []kubeletProvider `yaml:"providers"`
}

type kubeletProvider struct {
	Name                 string   `yaml:"name"`
	MatchImages          []string `yaml:"matchImages"`
	DefaultCacheDuration string   `yaml:"defaultCacheDuration"`
	APIVersion           string   `yaml:"apiVersion"`
	Args                 []string `yaml:"args"`
	Env                  []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	TokenAttributes any `yaml:"tokenAttributes"`
}

// plugin is a program and the images that it is asked for.
type plugin struct {
	name, file string
	args, env  []string
	apiVersion string
	images     []Pattern
	keep       time.Duration // an answer that does not say
}

// NewKubelet reads a configuration (the kubelet's --image-credential-provider-config) of the
// plugins in a directory (--image-credential-provider-bin-dir). The error names everything
// that is wrong with it; the plugins themselves are looked at when they are run.
func NewKubelet(config, dir string) (*Kubelet, error) {
	plugins, err := readPlugins(config, dir)
	if err != nil {
		return nil, fmt.Errorf("read the kubelet's credential providers in %s: %w", config, err)
	}
	return &Kubelet{plugins: plugins, running: make(chan struct{}, maxRunning), cached: map[cacheKey]answer{}}, nil
}

func readPlugins(config, dir string) ([]plugin, error) {
	f, err := os.Open(config)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKubeletConfig+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxKubeletConfig {
		return nil, fmt.Errorf("it is larger than %d bytes", maxKubeletConfig)
	}
	var c kubeletConfig
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(&c); err != nil {
		return nil, err
	}
	return c.plugins(dir)
}

// plugins returns what c says, or all that is wrong with it.
func (c kubeletConfig) plugins(dir string) (list []plugin, err error) {
	var errs []error
	find := func(wrong bool, format string, args ...any) {
		if wrong {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	group, version, _ := strings.Cut(c.APIVersion, "/")
	find(group != "kubelet.config.k8s.io" || !knownVersion(version), "apiVersion: %q is not kubelet.config.k8s.io/v1", c.APIVersion)
	find(c.Kind != "CredentialProviderConfig", "kind: %q is not CredentialProviderConfig", c.Kind)
	find(len(c.Providers) == 0 || len(c.Providers) > maxPlugins, "providers: want 1 to %d", maxPlugins)
	for _, p := range c.Providers {
		q, err := p.plugin(dir)
		if err != nil {
			errs = append(errs, fmt.Errorf("provider %q: %w", p.Name, err))
		}
		find(slices.ContainsFunc(list, func(o plugin) bool { return o.name == p.Name }), "provider %q: there are two of this name", p.Name)
		list = append(list, q)
	}
	return list, errors.Join(errs...)
}

// plugin returns what p says, or all that is wrong with it.
func (p kubeletProvider) plugin(dir string) (q plugin, err error) {
	var errs []error
	find := func(wrong bool, format string, args ...any) {
		if wrong {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	find(p.Name == "" || filepath.Base(p.Name) != p.Name || p.Name == "." || p.Name == "..", "the name is no file in the plugins' directory")
	find(p.TokenAttributes != nil, "tokenAttributes: there is no pod here whose service account token could be sent")
	group, version, _ := strings.Cut(p.APIVersion, "/")
	find(group != "credentialprovider.kubelet.k8s.io" || !knownVersion(version), "apiVersion: %q is not credentialprovider.kubelet.k8s.io/v1", p.APIVersion)
	find(len(p.MatchImages) == 0, "matchImages: want at least one")
	q = plugin{name: p.Name, file: filepath.Join(dir, p.Name), args: p.Args, apiVersion: p.APIVersion}
	for _, text := range p.MatchImages {
		pattern, err := ParsePattern(text)
		find(err != nil, "matchImages: %w", err)
		q.images = append(q.images, pattern)
	}
	for _, e := range p.Env {
		q.env = append(q.env, e.Name+"="+e.Value)
	}
	q.keep, err = time.ParseDuration(p.DefaultCacheDuration)
	find(err != nil || q.keep < 0, "defaultCacheDuration: %q is no duration", p.DefaultCacheDuration)
	return q, errors.Join(errs...)
}

func knownVersion(v string) bool { return slices.Contains([]string{"v1", "v1beta1", "v1alpha1"}, v) }

// Name is "kubelet".
func (*Kubelet) Name() string { return "kubelet" }

// Login returns the most specific login that the plugins for an image have.
func (k *Kubelet) Login(ctx context.Context, image string) (Login, error) {
	image = Repository(complete(image))
	var ring keyring
	var errs []error
	for _, p := range k.plugins {
		if !slices.ContainsFunc(p.images, func(m Pattern) bool { return m.Match(image) }) {
			continue
		}
		a, err := k.answer(ctx, p, image)
		if err != nil {
			errs = append(errs, fmt.Errorf("credential provider %s: %w", p.name, err))
			continue
		}
		for _, e := range a.ring {
			e.login.Until = a.until
			ring = append(ring, e)
		}
	}
	if e, ok := ring.sorted().find(image); ok {
		return e.login, nil
	}
	return Login{}, errors.Join(errs...)
}

// answer returns what a plugin says, or has said. Who asks the same at the same time shares
// one run of it, which goes on when one of them leaves.
func (k *Kubelet) answer(ctx context.Context, p plugin, image string) (answer, error) {
	if a, ok := k.look(p.name, image); ok {
		return a, nil
	}
	flight := k.flights.DoChan(p.name+" "+image, func() (any, error) {
		if a, ok := k.look(p.name, image); ok {
			return a, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), providerTime)
		defer cancel()
		select {
		case k.running <- struct{}{}:
			defer func() { <-k.running }()
		case <-ctx.Done():
			return nil, fmt.Errorf("%d others run already: %w", maxRunning, ctx.Err())
		}
		r, err := p.run(ctx, image)
		if err != nil {
			return nil, err
		}
		return k.keep(p, image, r), nil
	})
	select {
	case r := <-flight:
		if r.Err != nil {
			return answer{}, r.Err
		}
		return r.Val.(answer), nil
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
}
