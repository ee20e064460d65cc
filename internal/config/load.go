package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// maxSecret bounds a file of a secret.
const maxSecret = 64 << 10

// Load reads erofsd's own TOML, checks it and puts it over [Default]. Every unknown key
// and every wrong value is a [Problem] of the joined error, with its line. Files of
// secrets are named relative to the configuration's directory.
func Load(name string) (Config, error) {
	f, err := os.Open(name)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	dir := filepath.Dir(name)
	return decodeOwn(data, name, func(secret string) (Secret, error) {
		if !filepath.IsAbs(secret) {
			secret = filepath.Join(dir, secret)
		}
		return readSecret(secret)
	})
}

// decodeOwn is Load without files. name is for errors.
func decodeOwn(data []byte, name string, secret func(string) (Secret, error)) (Config, error) {
	root, err := parseTOML(data)
	if err != nil {
		if s, ok := errors.AsType[*syntaxError](err); ok {
			err = Problem{File: name, Line: s.line, Column: s.column, Text: s.text}
		}
		return Config{}, err
	}
	d := &decoder{own: true, secret: secret}
	c := Default()
	d.object(root, nil, addressed(&c))
	c.check(&d.findings)
	if err := d.err(root, name); err != nil {
		return Config{}, err
	}
	return c, nil
}

// readSecret reads a file that only its owner and group can read; a newline at its end
// is not part of the secret.
func readSecret(name string) (Secret, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("read secret: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return "", fmt.Errorf("read secret: %w", err)
	case !st.Mode().IsRegular():
		return "", fmt.Errorf("read secret: %s is not a regular file", name)
	case st.Mode()&0o007 != 0:
		return "", fmt.Errorf("read secret: everybody can read or change %s: chmod o= it", name)
	case st.Size() > maxSecret:
		return "", fmt.Errorf("read secret: %s is larger than %d bytes", name, maxSecret)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxSecret))
	if err != nil {
		return "", fmt.Errorf("read secret: %w", err)
	}
	s := strings.TrimRight(string(text), "\r\n")
	if s == "" {
		return "", fmt.Errorf("read secret: %s is empty", name)
	}
	return Secret(s), nil
}
