package erofsd

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/erofsd/erofsd/internal/config"
)

// An environment is what nydusd's variables say.
type environment struct {
	auth     config.Secret            // of registries for which there is no other, IMAGE_PULL_AUTH
	headers  map[string]config.Secret // of every request to a backend, NYDUS_HEADER_<Name>
	least    string                   // level below which nothing is logged, RUST_LOG; "": any
	warnings []string
}

// readEnvironment reads nydusd's variables from environ. No error has a value in it.
func readEnvironment(environ []string) (environment, error) {
	e := environment{headers: map[string]config.Secret{}}
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		header, isHeader := strings.CutPrefix(name, "NYDUS_HEADER_")
		switch {
		case value == "":
		case name == "IMAGE_PULL_AUTH":
			login, err := base64.StdEncoding.DecodeString(value)
			if err != nil || !strings.Contains(string(login), ":") {
				return e, errors.New("IMAGE_PULL_AUTH: want base64 of user:password")
			}
			e.auth = config.Secret(value)
		case name == "RUST_LOG":
			e.rustLog(value)
		case isHeader:
			if !isToken(header) || strings.ContainsAny(value, "\r\n\x00") {
				return e, fmt.Errorf("%s: not a header", name)
			}
			e.headers[header] = config.Secret(value)
		}
	}
	return e, nil
}

// isToken reports whether s can be a header's name.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !strings.ContainsRune("!#$%&'*+-.^_`|~", r) && (r < '0' || r > '9') && (r|0x20 < 'a' || r|0x20 > 'z')
	})
}

// levels are those of the log, from nothing to everything.
func levels() []string { return []string{"off", "error", "warn", "info", "debug", "trace"} }

// rustLog reads a specification of env_logger: levels, alone or for a part of nydusd's
// code, which erofsd does not have.
func (e *environment) rustLog(spec string) {
	spec, _, filtered := strings.Cut(spec, "/")
	ignored := filtered
	for directive := range strings.SplitSeq(spec, ",") {
		level := strings.ToLower(strings.TrimSpace(directive))
		if slices.Contains(levels(), level) {
			e.least = level
		} else if level != "" {
			ignored = true
		}
	}
	if ignored {
		e.warnings = append(e.warnings, "RUST_LOG: of all that it says only a level alone has an effect")
	}
}

// level is the level that lets through only what both the given one and RUST_LOG let
// through.
func (e *environment) level(given string) string {
	if e.least == "" {
		return given
	}
	all := levels()
	return all[min(slices.Index(all, strings.ToLower(given)), slices.Index(all, e.least))]
}

// adjust puts into i what the environment says and i does not.
func (e *environment) adjust(i *config.Image) {
	b := &i.Backend
	if r := b.Registry; r != nil && e.auth != "" && r.Auth == "" && r.Token == "" && r.Credentials == "" {
		changed := *r
		changed.Auth = e.auth
		b.Registry = &changed
	}
	if len(e.headers) == 0 {
		return
	}
	switch {
	case b.Registry != nil:
		b.Registry = withHeaders(b.Registry, e.headers, func(r *config.Registry) *config.HTTP { return &r.HTTP })
	case b.S3 != nil:
		b.S3 = withHeaders(b.S3, e.headers, func(s *config.S3) *config.HTTP { return &s.HTTP })
	case b.OSS != nil:
		b.OSS = withHeaders(b.OSS, e.headers, func(o *config.OSS) *config.HTTP { return &o.HTTP })
	case b.HTTPProxy != nil:
		b.HTTPProxy = withHeaders(b.HTTPProxy, e.headers, func(p *config.HTTPProxy) *config.HTTP { return &p.HTTP })
	}
}

// withHeaders returns a copy of a backend that has the given headers besides its own,
// which win.
func withHeaders[B any](backend *B, headers map[string]config.Secret, part func(*B) *config.HTTP) *B {
	changed := *backend
	all := maps.Clone(headers)
	maps.Copy(all, part(backend).Headers)
	part(&changed).Headers = all
	return &changed
}
