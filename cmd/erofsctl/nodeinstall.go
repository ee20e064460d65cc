package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/erofsd/erofsd/configs"
	"github.com/erofsd/erofsd/internal/api"
)

// What there is on a node, beside the programs.
const (
	daemonUnit      = "erofsd.service"
	snapshotterUnit = "containerd-erofsd-grpc.service"
	nodeUnits       = "/etc/systemd/system"
	nodeConfigs     = "/etc/erofsd"
	nodeAccount     = nodeConfigs + "/kubernetes"
	dropInName      = "10-node.conf"
)

// nodePrograms are installed on a node.
var nodePrograms = []string{"erofsd", "erofsctl", "containerd-erofsd-grpc"}

// dropIn has a unit use the node's programs and configuration. The units themselves are as
// shipped.
func (n node) unitDropIn(unit string) string {
	if unit == daemonUnit {
		return fmt.Sprintf("[Service]\nExecStart=\nExecStart=%[1]s/erofsd --transport fanotify --config %[2]s/erofsd.toml\nExecReload=\nExecReload=%[1]s/erofsctl upgrade\n", n.bin, nodeConfigs)
	}
	return fmt.Sprintf("[Unit]\nAfter=%s\nWants=%[1]s\n\n[Service]\nExecStart=\nExecStart=%[2]s/containerd-erofsd-grpc --config %[3]s/containerd-erofsd.toml\n", daemonUnit, n.bin, nodeConfigs)
}

// changes says what was another one before.
type changes struct{ daemon, snapshotter, units, containerd bool }

// install brings the node to what the pod has. It changes nothing before it knows that it can
// work, and ends nothing that containers use: erofsd hands its images over, the snapshotter
// is started anew beside it. Done again it does nothing.
func (n node) install(ctx context.Context) error {
	if err := n.able(); err != nil {
		return err
	}
	dropIn, err := n.containerdDropIn()
	if err != nil {
		return err
	}
	c, err := n.placeAll()
	if err != nil {
		return err
	}
	if err := n.apply(ctx, c); err != nil {
		return err
	}
	if dropIn == nil { // last: containerd must not look for a snapshotter that is not there
		return n.check(ctx)
	}
	if err := n.check(ctx); err != nil {
		return err
	}
	if c.containerd, err = n.place(n.dropIn, dropIn, 0o644); err != nil || !c.containerd {
		return err
	}
	if !n.restart {
		fmt.Fprintln(n.out, "containerd uses it after its next restart: systemctl restart containerd")
		return nil
	}
	_, err = n.systemctl(ctx, "restart", "containerd.service")
	return err
}

// able says why this node or this configuration cannot do.
func (n node) able() error {
	if _, err := n.host.Stat("run/systemd/system"); err != nil {
		return fmt.Errorf("look for the node's systemd: %w (without systemd run erofsd and containerd-erofsd-grpc by what starts services there)", err)
	}
	if err := n.probe(filepath.Join(n.host.Name(), "var/lib/erofsd")); err != nil {
		return fmt.Errorf("this node's kernel cannot serve images: %w (keep the pod away from it: nodeSelector, affinity)", err)
	}
	file := filepath.Join(n.configs, "containerd-erofsd.toml")
	out, err := exec.Command(filepath.Join(n.programs, "containerd-erofsd-grpc"), "--config", file, "--check").CombinedOutput()
	if err != nil {
		return fmt.Errorf("check %s: %w: %s", file, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// placeAll writes programs, configuration and units.
func (n node) placeAll() (c changes, err error) {
	put := func(to *bool, path string, data []byte, mode fs.FileMode, rerr error) {
		if rerr != nil {
			err = errors.Join(err, fmt.Errorf("install %s: %w", path, rerr))
			return
		}
		changed, perr := n.place(path, data, mode)
		*to, err = *to || changed, errors.Join(err, perr)
	}
	both := map[string]*bool{"erofsd": &c.daemon, "containerd-erofsd-grpc": &c.snapshotter, "erofsctl": new(bool)}
	for _, name := range nodePrograms {
		data, rerr := read(filepath.Join(n.programs, name))
		put(both[name], filepath.Join(n.bin, name), data, 0o755, rerr)
	}
	for name, to := range map[string]*bool{"erofsd.toml": &c.daemon, "containerd-erofsd.toml": &c.snapshotter} {
		data, rerr := read(filepath.Join(n.configs, name))
		put(to, filepath.Join(nodeConfigs, name), data, 0o600, rerr)
	}
	for _, unit := range []string{daemonUnit, snapshotterUnit} {
		data, rerr := configs.File("systemd/" + unit)
		put(&c.units, filepath.Join(nodeUnits, unit), data, 0o644, rerr)
		put(&c.units, filepath.Join(nodeUnits, unit+".d", dropInName), []byte(n.unitDropIn(unit)), 0o644, nil)
	}
	if n.account != "" {
		err = errors.Join(err, n.copyAccount())
	}
	return c, err
}

// apply has systemd run what was placed.
func (n node) apply(ctx context.Context, c changes) error {
	if c.units {
		if _, err := n.systemctl(ctx, "daemon-reload"); err != nil {
			return err
		}
	}
	if _, err := n.systemctl(ctx, "enable", daemonUnit, snapshotterUnit); err != nil {
		return err
	}
	for _, s := range []struct {
		unit    string
		changed bool
		renew   string // what has it run what was placed, with everything that containers use
	}{{daemonUnit, c.daemon, "reload"}, {snapshotterUnit, c.snapshotter, "restart"}} {
		how := "start"
		if _, err := n.systemctl(ctx, "is-active", s.unit); err == nil && s.changed {
			how = s.renew
		}
		if _, err := n.systemctl(ctx, how, s.unit); err != nil {
			return err
		}
	}
	return nil
}

// containerdDropIn is what containerd is told, nil if nothing.
func (n node) containerdDropIn() ([]byte, error) {
	if n.dropIn == "" {
		return nil, nil
	}
	const name = "etc/containerd/config.toml"
	text, err := n.host.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read containerd's configuration: %w", err)
	}
	var main struct {
		Version int      `toml:"version"`
		Imports []string `toml:"imports"`
	}
	if err := toml.Unmarshal(text, &main); err != nil {
		return nil, fmt.Errorf("read containerd's configuration: %w", err)
	}
	if err == nil && main.Version < 3 {
		return nil, fmt.Errorf("containerd's configuration has version %d: with containerd 1 an imported file replaces all that /%s says of CRI; put configs/containerd/config-v2.toml into it by hand, and leave --containerd-drop-in out", main.Version, name)
	}
	if err == nil && !slices.ContainsFunc(main.Imports, func(p string) bool { ok, _ := filepath.Match(p, n.dropIn); return ok }) {
		return nil, fmt.Errorf(`containerd's configuration /%s does not import %s: add imports = [%q] to it, or leave --containerd-drop-in out`, name, n.dropIn, n.dropIn)
	}
	return configs.File("containerd/config-v3.toml")
}

// checkTime bounds the answer of a service.
const checkTime = 10 * time.Second

// check returns what does not answer.
func (n node) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	daemon := api.NewClient(filepath.Join(n.host.Name(), "run/erofsd/erofsd.sock"))
	defer daemon.Close()
	err := daemon.Health(ctx)
	if err != nil {
		err = fmt.Errorf("erofsd: %w (journalctl -u erofsd on the node says more)", err)
	}
	socket := filepath.Join(n.host.Name(), defaultAddress)
	if derr := dialUnix(ctx, socket); derr != nil {
		err = errors.Join(err, fmt.Errorf("snapshotter: %w (journalctl -u containerd-erofsd-grpc on the node says more)", derr))
	}
	return err
}
