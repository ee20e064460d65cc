package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/erofsd/erofsd/configs"
)

// containerdConfig is what matters of containerd's configuration.
type containerdConfig struct {
	Version int              `toml:"version"`
	Imports []string         `toml:"imports"`
	Proxies map[string]proxy `toml:"proxy_plugins"`
	Plugins map[string]any   `toml:"plugins"`
}

type proxy struct {
	Type    string            `toml:"type"`
	Address string            `toml:"address"`
	Exports map[string]string `toml:"exports"`
}

// Tables of plugins by version of the configuration.
const (
	criV2    = "io.containerd.grpc.v1.cri"
	imagesV3 = "io.containerd.cri.v1.images"
)

// examineContainerd finds whether containerd has the snapshotter, and how.
func (d *doctor) examineContainerd(ctx context.Context) {
	major := d.containerdVersion(ctx)
	c, err := d.readContainerd(d.containerd, map[string]bool{})
	if errors.Is(err, fs.ErrNotExist) {
		c, err = containerdConfig{}, nil
	}
	if err != nil {
		d.add(failure, "containerd", "correct it; containerd config dump says what containerd reads", "%v", err)
		return
	}
	name := c.proxyAt(d.snapshotter)
	if name == "" {
		d.untold(c, major)
		return
	}
	d.add(fine, "containerd", "", "%s has the snapshotter %s", d.containerd, name)
	if major >= 2 && c.Version == 2 && c.lostByMigration(name) {
		d.add(failure, "CRI", "containerd config migrate > new.toml, and put what configs/containerd/config-v3.toml (or runtime-v3.toml) says into it",
			"containerd %d reads version 2 of %s and loses there that Kubernetes uses the snapshotter", major, d.containerd)
		return
	}
	d.examineCRI(c, name)
}

// containerdVersion returns containerd's first number, 0 if it is not known.
func (d *doctor) containerdVersion(ctx context.Context) (major int) {
	out, err := d.run(ctx, "containerd", "--version")
	if err != nil {
		d.add(note, "containerd", "", "no program containerd: %v", err)
		return 0
	}
	var minor int
	fields := strings.Fields(out) // containerd MODULE VERSION COMMIT
	if len(fields) >= 3 {
		_, _ = fmt.Sscanf(strings.TrimPrefix(fields[2], "v"), "%d.%d", &major, &minor) // else 0
	}
	switch {
	case major == 0:
		d.add(warning, "containerd", "", "its version is not known: %q", out)
	case major == 1 && minor < 6:
		d.add(failure, "containerd", "1.6 or later is needed", "version %s", fields[2])
	default:
		d.add(fine, "containerd", "", "version %s", fields[2])
	}
	return major
}

// untold says that containerd has no such snapshotter. Where none is installed that is as it
// should be.
func (d *doctor) untold(c containerdConfig, major int) {
	how := failure
	if _, err := os.Lstat(d.at(d.snapshotter)); err != nil {
		how = note
	}
	file, first := "containerd/config-v2.toml", ""
	if c.Version >= 3 || major >= 2 {
		file = "containerd/config-v3.toml"
	}
	if c.Version > 0 && c.Version < 3 && major >= 2 {
		first = "bring it to the version of containerd (containerd config migrate), then "
	}
	text, _ := configs.File(file) // it is a part of this program
	stanza := strings.ReplaceAll(string(text), defaultAddress, d.snapshotter)
	for name, p := range c.Proxies {
		if p.Type == "snapshot" && (name == "erofsd" || name == "nydus") {
			d.add(failure, "containerd", "one of the two is wrong: address of the snapshotter's configuration, or this; then restart containerd", "%s looks for the snapshotter %s at %s, and not at %s", d.containerd, name, p.Address, d.snapshotter)
			return
		}
	}
	d.add(how, "containerd", fmt.Sprintf("%sadd this to %s, as far as it is not there, and restart containerd:\n%s", first, d.containerd, stanza), "%s says nothing of the snapshotter at %s", d.containerd, d.snapshotter)
}

// proxyAt is the name of the snapshotter at a socket.
func (c containerdConfig) proxyAt(address string) string {
	for name, p := range c.Proxies {
		if p.Type == "snapshot" && filepath.Clean(p.Address) == filepath.Clean(address) {
			return name
		}
	}
	return ""
}

// examineCRI finds what keeps Kubernetes from lazy images.
func (d *doctor) examineCRI(c containerdConfig, name string) {
	table, key := []string{imagesV3}, "\n[plugins.\""+imagesV3+"\"]\n"
	if c.Version < 3 {
		table, key = []string{criV2, "containerd"}, "\n[plugins.\""+criV2+"\".containerd]\n"
	}
	cri := c.table(table...)
	if cri["snapshotter"] != name && !c.runtimeUses(name) {
		d.add(note, "CRI", "", "Kubernetes uses the snapshotter %v; others use %s when they name it", cmp.Or[any](cri["snapshotter"], "overlayfs"), name)
		return
	}
	right := true
	if cri["disable_snapshot_annotations"] != false {
		right = false
		d.add(warning, "CRI", "in "+d.containerd+":"+key+"disable_snapshot_annotations = false", "Kubernetes does not say by which reference it pulls, so containerd is asked each time")
	}
	if cri["discard_unpacked_layers"] == true {
		right = false
		d.add(warning, "CRI", "in "+d.containerd+":"+key+"discard_unpacked_layers = false", "containerd drops layers that are unpacked: nobody can push or export an image, and another namespace fetches it again")
	}
	if c.Version >= 3 && c.Proxies[name].Exports["root"] == "" {
		right = false
		d.add(warning, "CRI", fmt.Sprintf("in %s:\n[proxy_plugins.%s.exports]\nroot = \"/var/lib/containerd/io.containerd.snapshotter.v1.erofsd\"", d.containerd, name), "the kubelet does not see how full the snapshotter's disk is")
	}
	if right {
		d.add(fine, "CRI", "", "Kubernetes uses it, and says what it pulls")
	}
}

// lostByMigration reports whether containerd 2 loses the snapshotter of CRI from a file of
// version 2: as of 2.4 it takes that only from a file that has runtimes too, and never that of
// a runtime for its images.
func (c containerdConfig) lostByMigration(name string) bool {
	cri := c.table(criV2, "containerd")
	_, runtimes := cri["runtimes"]
	return cri["snapshotter"] == name && !runtimes || c.runtimeUses(name)
}

// table is a table of the plugins, nil if there is none.
func (c containerdConfig) table(path ...string) map[string]any {
	at := c.Plugins
	for _, name := range path {
		at, _ = at[name].(map[string]any)
	}
	return at
}

// runtimeUses reports whether a runtime of CRI has the snapshotter for itself.
func (c containerdConfig) runtimeUses(name string) bool {
	for _, at := range [][]string{{criV2, "containerd", "runtimes"}, {imagesV3, "runtime_platforms"}, {"io.containerd.cri.v1.runtime", "containerd", "runtimes"}} {
		for _, r := range c.table(at...) {
			if m, ok := r.(map[string]any); ok && m["snapshotter"] == name {
				return true
			}
		}
	}
	return false
}

// mostFiles bounds the files that one configuration imports.
const mostFiles = 1000

// readContainerd reads a file and those that it imports, each once.
func (d *doctor) readContainerd(path string, seen map[string]bool) (c containerdConfig, err error) {
	seen[path] = true
	text, err := os.ReadFile(d.at(path))
	if err != nil {
		return c, fmt.Errorf("read containerd's configuration: %w", err)
	}
	if err := toml.Unmarshal(text, &c); err != nil {
		return c, fmt.Errorf("read containerd's configuration %s: %w", path, err)
	}
	if c.Version == 1 || c.Version == 0 && len(c.Plugins) > 0 {
		d.add(warning, "containerd", "containerd config migrate", "%s has version %d of its format, and not 2 or later", path, c.Version)
	}
	for _, pattern := range c.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(path), pattern)
		}
		names, err := filepath.Glob(d.at(pattern))
		if err != nil {
			return c, fmt.Errorf("read containerd's configuration %s: imports: %w", path, err)
		}
		for _, name := range slices.Sorted(slices.Values(names)) {
			rel, err := filepath.Rel(d.host, name)
			if name := "/" + rel; err == nil && !seen[name] && len(seen) < mostFiles {
				if err := d.importContainerd(&c, path, name, seen); err != nil {
					return c, err
				}
			}
		}
	}
	return c, nil
}

// importContainerd adds an imported file to c, as containerd does.
func (d *doctor) importContainerd(c *containerdConfig, path, name string, seen map[string]bool) error {
	more, err := d.readContainerd(name, seen)
	if err != nil {
		return err
	}
	if c.Proxies == nil {
		c.Proxies = map[string]proxy{}
	}
	if c.Plugins == nil {
		c.Plugins = map[string]any{}
	}
	for k, p := range more.Proxies {
		c.Proxies[k] = p
	}
	for k, p := range more.Plugins {
		if _, both := c.Plugins[k]; both && c.Version < 3 {
			d.add(warning, "containerd", "put all of it into one file", "%s has a table for %s, which containerd 1 takes in place of all that %s says there", name, k, path)
		}
		c.Plugins[k] = merged(c.Plugins[k], p, c.Version >= 3)
	}
	return nil
}

// merged is what containerd makes of a value and another that is imported: with deep tables
// are put together.
func merged(a, b any, deep bool) any {
	to, ok := a.(map[string]any)
	from, both := b.(map[string]any)
	if !deep || !ok || !both {
		return b
	}
	for k, v := range from {
		to[k] = merged(to[k], v, true)
	}
	return to
}
