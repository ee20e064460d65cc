package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/erofsd/erofsd/internal/keychain"
)

// object is a part of one of nydus's configurations.
type object = map[string]any

// A place says where the data of an image come from, and with which login they are read.
type place func(host, repo string, l keychain.Login) (json.RawMessage, error)

// place is where c says: the registry that each image was pulled from, or where a template
// says; then inRegistry is false, and the arguments do not matter.
func (c backendConfig) place() (p place, inRegistry bool, err error) {
	template := object{}
	if c.Template != "" {
		text, err := readTemplate(c.Template)
		if err != nil {
			return nil, false, err
		}
		if err := json.Unmarshal(text, &template); err != nil {
			return nil, false, fmt.Errorf("read backend.template %s: %w", c.Template, err)
		}
		if kind := backendType(template); kind == "" {
			return nil, false, fmt.Errorf("read backend.template %s: want nydus's JSON with device.backend.type, or version 2 with backend.type", c.Template)
		} else if kind != "registry" {
			return func(string, string, keychain.Login) (json.RawMessage, error) { return text, nil }, false, nil
		}
	}
	return func(host, repo string, l keychain.Login) (json.RawMessage, error) {
		return json.Marshal(c.registry(template, host, repo, l))
	}, true, nil
}

// backendType is what a template's data come from.
func backendType(template object) string {
	t, _ := backendOf(template)["type"].(string)
	return t
}

// backendOf is the table of the backend in either version of nydus's configuration.
func backendOf(template object) object {
	if device, ok := template["device"].(object); ok {
		template = device
	}
	b, _ := template["backend"].(object)
	return b
}

// registry is the configuration of an image in a registry; what a template says of it
// stays, but for a login when there is one.
func (c backendConfig) registry(template object, host, repo string, l keychain.Login) object {
	keys := object{"host": host, "repo": repo, "scheme": "https"}
	if slices.Contains(c.PlainHTTP, host) {
		keys["scheme"] = "http"
	}
	for name, v := range map[string]any{"credentials": c.Credentials, "hosts_dir": c.HostsDir} {
		if v != "" {
			keys[name] = v
		}
	}
	if c.SkipVerify {
		keys["skip_verify"] = true
	}
	if len(c.CAFiles) > 0 {
		keys["ca_cert_files"] = c.CAFiles
	}
	old := backendOf(template)
	for _, table := range []string{"registry", "config"} { // version 2, version 1
		said, _ := old[table].(object)
		for name, v := range said {
			if name != "host" && name != "repo" {
				keys[name] = v
			}
		}
	}
	setLogin(keys, l)
	return object{"version": 2, "backend": object{"type": "registry", "registry": keys}, "cache": cacheOf(template)}
}

// setLogin puts a login into the configuration of a registry.
func setLogin(keys object, l keychain.Login) {
	if l.Empty() {
		return
	}
	delete(keys, "auth")
	delete(keys, "registry_token")
	switch {
	case l.Docker:
		keys["credentials"] = "docker"
	case l.Username == "":
		keys["registry_token"] = l.Password
	default:
		keys["auth"] = base64.StdEncoding.EncodeToString([]byte(l.Username + ":" + l.Password))
	}
}

// cacheOf is the template's prefetching, in version 2.
func cacheOf(template object) object {
	cache := object{}
	if c, ok := template["cache"].(object); ok && template["device"] == nil {
		maps.Copy(cache, c)
	}
	if p, ok := template["fs_prefetch"].(object); ok {
		v2 := object{}
		for old, name := range map[string]string{
			"enable": "enable", "threads_count": "threads", "merging_size": "batch_size", "bandwidth_rate": "bandwidth_limit", "prefetch_all": "prefetch_all",
		} {
			if v, ok := p[old]; ok {
				v2[name] = v
			}
		}
		cache["prefetch"] = v2
	}
	return cache
}

// splitReference returns the host and the repository of an image's reference. They become parts
// of URLs and of the names of directories: what is no reference is an error.
func splitReference(image string) (host, repo string, err error) {
	if image == "" {
		return "", "", fmt.Errorf("nobody knows by which reference the image was pulled: let containerd tell (disable_snapshot_annotations = false), "+
			"set containerd.address in the snapshotter's configuration, or a backend.template that is no registry: %w", errdefs.ErrFailedPrecondition)
	}
	name, _, _ := strings.Cut(image, "@")
	named, err := reference.Parse(name)
	if n, ok := named.(reference.Named); ok && err == nil && reference.Domain(n) != "" {
		return reference.Domain(n), reference.Path(n), nil
	}
	return "", "", fmt.Errorf("image reference %.200q is not host/repository: %w", image, errdefs.ErrFailedPrecondition)
}
