package keychain

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// A Pattern chooses images as the kubelet's matchImages do: host[:port][/path], where each
// label of the host is a glob that stands for one label, the port is the same, and the
// repository begins with the path.
type Pattern struct {
	labels     []string
	port, path string
}

// maxPattern bounds a pattern, in bytes.
const maxPattern = 1024

// ParsePattern reads a pattern.
func ParsePattern(text string) (Pattern, error) {
	if text == "" || len(text) > maxPattern || strings.Contains(text, "://") || strings.ContainsAny(text, " \t\r\n@?#\\") {
		return Pattern{}, fmt.Errorf("%.100q is no pattern of images: want host[:port][/path], * in labels of the host", text)
	}
	p := splitName(text)
	for _, l := range p.labels {
		if _, err := path.Match(l, ""); err != nil || l == "" {
			return Pattern{}, fmt.Errorf("%.100q is no pattern of images: its host is malformed", text)
		}
	}
	return p, nil
}

// splitName takes host[:port][/path] apart. Docker Hub has three names.
func splitName(name string) Pattern {
	host, rest, slash := strings.Cut(name, "/")
	p := Pattern{}
	if slash {
		p.path = "/" + rest
	}
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host, p.port = host[:i], host[i+1:]
	}
	host = strings.ToLower(host)
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		host = "docker.io"
	}
	p.labels = strings.Split(host, ".")
	return p
}

// Match reports whether p means the image, host/repository with or without tag and digest.
func (p Pattern) Match(image string) bool {
	i := splitName(Repository(image))
	if p.port != i.port || !strings.HasPrefix(i.path, p.path) || len(p.labels) != len(i.labels) {
		return false
	}
	for n, glob := range p.labels {
		if ok, err := path.Match(glob, i.labels[n]); err != nil || !ok {
			return false
		}
	}
	return true
}

// Repository is an image's reference without tag and digest.
func Repository(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		image = image[:i]
	}
	return image
}

// sameHost reports whether two names are of one registry.
func sameHost(a, b string) bool {
	x, y := splitName(a), splitName(b)
	return x.port == y.port && slices.Equal(x.labels, y.labels)
}

// Host is the registry, host or host:port, of an image's reference.
func Host(image string) string {
	host, _, _ := strings.Cut(image, "/")
	return host
}

// compare puts the more specific of two patterns first: the longer path, then fewer globs.
func (p Pattern) compare(o Pattern) int {
	globs := func(p Pattern) (n int) {
		for _, l := range p.labels {
			if strings.ContainsAny(l, "*?[") {
				n++
			}
		}
		return n
	}
	return cmp.Or(cmp.Compare(len(o.path), len(p.path)), cmp.Compare(globs(p), globs(o)), slices.Compare(p.labels, o.labels))
}

// A keyring has logins by pattern, the most specific first.
type keyring []key

type key struct {
	pattern Pattern
	login   Login
}

// sorted puts the most specific keys first; among equals the order stays.
func (k keyring) sorted() keyring {
	slices.SortStableFunc(k, func(a, b key) int { return a.pattern.compare(b.pattern) })
	return k
}

// find returns the key that counts for an image.
func (k keyring) find(image string) (found key, ok bool) {
	i := slices.IndexFunc(k, func(e key) bool { return e.pattern.Match(image) })
	if i < 0 {
		return key{}, false
	}
	return k[i], true
}

// maxKeys bounds the logins of one document.
const maxKeys = 1024

var errKeys = errors.New("it has too many logins")
