package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/erofsd/erofsd/internal/keychain"
	"github.com/erofsd/erofsd/snapshotter"
)

// chosenBackend is the backend of some images. The first of the list that means an image
// counts, and nothing of [backend] does then. Its other keys, and their defaults, are those
// of backendConfig.
type chosenBackend struct {
	Images      []string `toml:"images"`
	Template    string   `toml:"template"`
	Credentials *string  `toml:"credentials"`
	HostsDir    string   `toml:"hosts_dir"`
	PlainHTTP   []string `toml:"plain_http"`
	SkipVerify  bool     `toml:"skip_verify"`
	CAFiles     []string `toml:"ca_files"`
}

func (b chosenBackend) backend() backendConfig {
	c := defaultConfig().Backend
	if b.Credentials != nil {
		c.Credentials = *b.Credentials
	}
	c.Template, c.HostsDir, c.PlainHTTP, c.SkipVerify, c.CAFiles = b.Template, b.HostsDir, b.PlainHTTP, b.SkipVerify, b.CAFiles
	return c
}

// checkBackends returns all that is wrong.
func checkBackends(list []chosenBackend) (errs []error) {
	for i, b := range list {
		_, err := b.patterns()
		if err == nil && len(b.Images) == 0 {
			err = errors.New("images: want at least one pattern")
		}
		if err == nil && !slices.Contains([]string{"", "docker"}, b.backend().Credentials) {
			err = fmt.Errorf("credentials: %q is neither docker nor empty", *b.Credentials)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("backends, number %d: %w", i+1, err))
		}
	}
	return errs
}

func (b chosenBackend) patterns() (list []keychain.Pattern, err error) {
	for _, text := range b.Images {
		p, err := keychain.ParsePattern(text)
		if err != nil {
			return nil, fmt.Errorf("images: %w", err)
		}
		list = append(list, p)
	}
	return list, nil
}

// A choice is a place for the images that one of the patterns means.
type choice struct {
	images     []keychain.Pattern // nil: all
	place      place
	inRegistry bool
}

func (c choice) means(reference string) bool {
	return c.images == nil || slices.ContainsFunc(c.images, func(p keychain.Pattern) bool { return p.Match(reference) })
}

// A loginFunc finds the login for an image, as keychain.Chain.Login does.
type loginFunc func(ctx context.Context, image string) (l keychain.Login, sure bool)

// source says where the data of each image come from, with the login that is known.
func (c config) source(login loginFunc) (snapshotter.Source, error) {
	choices, err := c.choices()
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, reference string) (snapshotter.Origin, error) {
		i := slices.IndexFunc(choices, func(c choice) bool { return c.means(reference) })
		return choices[i].origin(ctx, reference, login)
	}, nil
}

// choices are what c says; the last one is for all images.
func (c config) choices() (list []choice, err error) {
	for i, b := range c.Backends {
		var n choice
		if n.images, err = b.patterns(); err == nil {
			n.place, n.inRegistry, err = b.backend().place()
		}
		if err != nil {
			return nil, fmt.Errorf("backends, number %d: %w", i+1, err)
		}
		list = append(list, n)
	}
	var others choice
	others.place, others.inRegistry, err = c.Backend.place()
	return append(list, others), err
}

func (c choice) origin(ctx context.Context, reference string, login loginFunc) (o snapshotter.Origin, err error) {
	if !c.inRegistry {
		o.Config, err = c.place("", "", keychain.Login{})
		return o, err
	}
	host, repo, err := splitReference(reference)
	if err != nil {
		return o, err
	}
	l, sure := login(ctx, reference)
	o = snapshotter.Origin{Login: !l.Empty(), Until: l.Until, Unsure: !sure}
	o.Config, err = c.place(host, repo, l)
	return o, err
}
