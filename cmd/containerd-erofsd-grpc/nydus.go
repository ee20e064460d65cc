package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// This program takes the place of nydus-snapshotter: its config.toml, its flags and, called
// by its name, its defaults. A key is used, or has no effect and a warning that says why, or
// is refused where that would be a surprise.

const (
	nydusName     = "containerd-nydus-grpc"
	nydusRoot     = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus"
	nydusAddress  = "/run/containerd-nydus/containerd-nydus-grpc.sock"
	nydusSystem   = "/run/containerd-nydus/system.sock"
	nydusTemplate = "/etc/nydus/nydusd-config.json"
)

// An origin is what beside the file says how it is read.
type origin struct {
	nydusName bool           // the program was called by that
	flags     map[string]any // values by the names of nydus-snapshotter's flags that were given
}

func originOf(program string, flags *pflag.FlagSet) origin {
	return origin{nydusName: filepath.Base(program) == nydusName, flags: nydusFlags(flags)}
}

// isNydus tells the formats apart: nydus-snapshotter's always has a version, ours never.
func (o origin) isNydus(document map[string]any, file string) bool {
	_, ok := document["version"]
	return ok || o.nydusName && file == ""
}

// A nydusFlag is one of nydus-snapshotter's, by its name, and the key that it sets.
type nydusFlag struct {
	name, key string
	value     any // the kind of it, or of one without a value what it sets
}

// nydusFlagTable has the flags of today and, after an empty line, those of older versions.
func nydusFlagTable() []nydusFlag {
	return []nydusFlag{
		{"root", "root", ""},
		{"address", "address", ""},
		{"nydus-image", "daemon.nydusimage_path", ""},
		{"nydusd", "daemon.nydusd_path", ""},
		{"nydusd-config", "daemon.nydusd_config", ""},
		{"config-path", "daemon.nydusd_config", ""},
		{"nydus-overlayfs-path", "snapshot.nydus_overlayfs_path", ""},
		{"daemon-mode", "daemon_mode", ""},
		{"fs-driver", "daemon.fs_driver", ""},
		{"log-level", "log.level", ""},
		{"log-to-stdout", "log.log_to_stdout", false},

		{"shared-daemon", "daemon_mode", false},
		{"cache-dir", "cache_manager.cache_dir", ""},
		{"nydusd-path", "daemon.nydusd_path", ""},
		{"nydusimg-path", "daemon.nydusimage_path", ""},
		{"recover-policy", "daemon.recover_policy", ""},
		{"enable-stargz", "experimental.enable_stargz", false},
		{"daemon-backend", "daemon.fs_driver", ""},
		{"nydusd-thread-num", "daemon.threads_number", int64(0)},
	}
}

// addNydusFlags has flags know them.
func addNydusFlags(flags *pflag.FlagSet) {
	for _, f := range nydusFlagTable() {
		usage := "nydus-snapshotter's, as its key " + f.key
		switch f.value.(type) {
		case string:
			flags.String(f.name, "", usage)
		case bool:
			flags.Bool(f.name, false, usage)
		case int64:
			flags.Int64(f.name, 0, usage)
		}
	}
}

// nydusFlags returns those that were given. An empty text is none.
func nydusFlags(flags *pflag.FlagSet) map[string]any {
	given := map[string]any{}
	for _, f := range nydusFlagTable() {
		if !flags.Changed(f.name) {
			continue
		}
		switch f.value.(type) {
		case string:
			if v, err := flags.GetString(f.name); err == nil && v != "" {
				given[f.name] = v
			}
		case bool:
			if v, err := flags.GetBool(f.name); err == nil {
				given[f.name] = v
			}
		case int64:
			if v, err := flags.GetInt64(f.name); err == nil {
				given[f.name] = v
			}
		}
	}
	return given
}

// nydusConfig reads a document of nydus-snapshotter's. The error says all that is refused.
func nydusConfig(document, flags map[string]any) (config, []string, error) {
	keys := map[string]any{}
	flatten(keys, "", document)
	for _, f := range nydusFlagTable() {
		v, ok := flags[f.name]
		switch {
		case ok && f.name == "shared-daemon":
			keys[f.key] = map[any]string{true: "shared", false: "dedicated"}[v]
		case ok:
			keys[f.key] = v
		}
	}
	c := defaultConfig()
	c.Root, c.Address, c.System.Address = nydusRoot, nydusAddress, nydusSystem
	rules := nydusRules()
	var warnings []string
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		rule, ok := rules[key]
		if !ok {
			warnings = append(warnings, key+" has no effect: nydus-snapshotter does not know it either")
			continue
		}
		warning, err := rule(&c, keys[key])
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
		if warning != "" {
			warnings = append(warnings, key+" has no effect: "+warning)
		}
	}
	more, err := completeNydus(&c, keys)
	return c, append(warnings, more...), errors.Join(append(errs, err)...)
}

// flatten puts the values of tables in tables by their dotted keys.
func flatten(into map[string]any, at string, table map[string]any) {
	for name, v := range table {
		if inner, ok := v.(map[string]any); ok {
			flatten(into, at+name+".", inner)
			continue
		}
		into[at+name] = v
	}
}

// completeNydus does what follows from several keys.
func completeNydus(c *config, keys map[string]any) (warnings []string, err error) {
	if keys["log.log_to_stdout"] != true {
		dir, _ := keys["log.dir"].(string)
		if dir == "" {
			dir = filepath.Join(c.Root, "logs")
		}
		c.Log.File = filepath.Join(dir, "nydus-snapshotter.log")
	}
	c.Daemon.Socket = filepath.Join(filepath.Dir(c.Address), "erofsd.sock") // not that of another daemon
	if keys["system.enable"] != true {
		c.System.Address, c.System.Pprof = "", ""
	}
	// What is fetched goes where it went: the default's disk may have no room for it.
	cache, _ := keys["cache_manager.cache_dir"].(string)
	if cache == "" {
		cache = filepath.Join(c.Root, "cache")
	}
	c.Daemon.Root = filepath.Join(cache, "erofsd")
	c.Credentials.fromNydus(keys)
	if _, err := os.Stat(nydusTemplate); err == nil && c.Backend.Template == "" {
		c.Backend.Template = nydusTemplate
	}

	var errs []error
	driver, _ := keys["daemon.fs_driver"].(string)
	if keys["daemon_mode"] == "none" && driver != "fscache" {
		errs = append(errs, errors.New("daemon_mode: none is for images that others mount; for a daemon that somebody else starts "+
			"write our own configuration with daemon.mode = \"connect\""))
	}
	if limit, _ := keys["cgroup.memory_limit"].(string); limit != "" && keys["cgroup.enable"] == true {
		errs = append(errs, fmt.Errorf("cgroup.memory_limit: erofsd is in the snapshotter's cgroup and would not be limited to %q: "+
			"remove the key and set MemoryMax= of the service", limit))
	}
	if driver == "" || driver == "fusedev" {
		warnings = append(warnings, "daemon.fs_driver = \"fusedev\" has no effect: images are mounted by the kernel's EROFS, which mounts only RAFS version 6; "+
			"write \"fscache\" to say so")
	}
	return warnings, errors.Join(errs...)
}

// fromNydus asks the keychains that keys enable, in nydus-snapshotter's order, which has
// docker's always. Its secrets are those of all namespaces.
func (c *credentialsConfig) fromNydus(keys map[string]any) {
	enabled := func(key string) bool { return keys["remote.auth."+key] == true }
	cri, kubelet, secrets := enabled("enable_cri_keychain"), enabled("enable_kubelet_credential_providers"), enabled("enable_kubeconfig_keychain")
	if !cri && !kubelet && !secrets {
		return // erofsd asks docker's itself
	}
	if cri {
		c.Providers = append(c.Providers, fromCRI)
	}
	c.Providers = append(c.Providers, fromDocker)
	if kubelet {
		c.Providers = append(c.Providers, fromKubelet)
	}
	if secrets {
		c.Providers = append(c.Providers, fromSecrets)
		c.Secrets.Namespaces = []string{"*"}
	}
}

// A rule does what a key says; a warning says why it has no effect.
type rule func(c *config, v any) (warning string, err error)

// used is a key that has a meaning here.
func used[T any](set func(c *config, v T) error) rule {
	return func(c *config, v any) (string, error) {
		t, err := as[T](v)
		if err != nil {
			return "", err
		}
		return "", set(c, t)
	}
}

// unused is a key that has no effect, as why says. With the values that say what is so
// anyway there is no warning.
func unused[T comparable](why string, fine ...T) rule {
	return func(_ *config, v any) (string, error) {
		t, err := as[T](v)
		if err != nil || slices.Contains(fine, t) {
			return "", err
		}
		return why, nil
	}
}

// refused is a key that is an error unless it says what is so anyway.
func refused[T comparable](why string, fine ...T) rule {
	return func(_ *config, v any) (string, error) {
		t, err := as[T](v)
		if err == nil && !slices.Contains(fine, t) {
			err = fmt.Errorf("%#v is not possible: %s", t, why)
		}
		return "", err
	}
}

// known is a rule for one of a few values.
func known(then rule, values ...string) rule {
	return func(c *config, v any) (string, error) {
		text, err := as[string](v)
		if err == nil && !slices.Contains(values, text) {
			err = fmt.Errorf("%q is none of %s", text, strings.Join(values, ", "))
		}
		if err != nil {
			return "", err
		}
		return then(c, v)
	}
}

// as is v, which the file may have of another kind.
func as[T any](v any) (T, error) {
	t, ok := v.(T)
	if !ok {
		return t, fmt.Errorf("%v is no %s", v, map[string]string{"string": "text", "bool": "true or false", "int64": "whole number"}[fmt.Sprintf("%T", t)])
	}
	return t, nil
}
