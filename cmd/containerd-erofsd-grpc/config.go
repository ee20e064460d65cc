package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"

	"github.com/erofsd/erofsd/snapshotter"
)

// config is configs/containerd-erofsd.toml, which explains each key.
type config struct {
	Root       string           `toml:"root"`
	Address    string           `toml:"address"`
	Log        logConfig        `toml:"log"`
	Daemon     daemonConfig     `toml:"daemon"`
	Images     imagesConfig     `toml:"images"`
	Snapshots  snapshotsConfig  `toml:"snapshots"`
	Containerd containerdConfig `toml:"containerd"`
	Backend    backendConfig    `toml:"backend"`
}

type logConfig struct {
	Level  string `toml:"level"`
	Format string `toml:"format"`
}

type daemonConfig struct {
	Mode       string   `toml:"mode"`
	Socket     string   `toml:"socket"`
	Executable string   `toml:"executable"`
	Root       string   `toml:"root"`
	Config     string   `toml:"config"`
	Args       []string `toml:"args"`
}

type imagesConfig struct {
	Share snapshotter.Scope `toml:"share"`
}

type snapshotsConfig struct {
	OverlayOptions []string `toml:"overlay_options"`
}

type containerdConfig struct {
	Address string `toml:"address"`
}

type backendConfig struct {
	Template    string   `toml:"template"`
	Credentials string   `toml:"credentials"`
	HostsDir    string   `toml:"hosts_dir"`
	PlainHTTP   []string `toml:"plain_http"`
	SkipVerify  bool     `toml:"skip_verify"`
	CAFiles     []string `toml:"ca_files"`
}

// The modes of daemonConfig.
const (
	modeStart   = "start"
	modeConnect = "connect"
)

func defaultConfig() config {
	return config{
		Root:       "/var/lib/containerd/io.containerd.snapshotter.v1.erofsd",
		Address:    "/run/containerd-erofsd/containerd-erofsd-grpc.sock",
		Log:        logConfig{Level: "info", Format: "text"},
		Daemon:     daemonConfig{Mode: modeStart, Socket: "/run/erofsd/erofsd.sock", Root: "/var/lib/erofsd", Args: []string{}},
		Images:     imagesConfig{Share: snapshotter.ScopeAll},
		Snapshots:  snapshotsConfig{OverlayOptions: []string{}},
		Containerd: containerdConfig{Address: "/run/containerd/containerd.sock"},
		Backend:    backendConfig{Credentials: "docker", PlainHTTP: []string{}, CAFiles: []string{}},
	}
}

// loadConfig reads a configuration file over the defaults; "" is none.
func loadConfig(name string) (config, error) {
	c := defaultConfig()
	if name == "" {
		return c, c.validate()
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	err = d.Decode(&c)
	if unknown := (*toml.StrictMissingError)(nil); errors.As(err, &unknown) {
		err = fmt.Errorf("unknown keys:\n%s", unknown.String())
	} else if bad := (*toml.DecodeError)(nil); errors.As(err, &bad) {
		err = errors.New(bad.String())
	}
	if err == nil {
		err = c.validate()
	}
	if err != nil {
		return c, fmt.Errorf("read configuration %s: %w", name, err)
	}
	return c, nil
}

// maxSocket is the longest path of a unix socket.
const maxSocket = 107

// validate returns all that is wrong.
func (c config) validate() error {
	var errs []error
	find := func(wrong bool, format string, args ...any) {
		if wrong {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for key, path := range map[string]string{"root": c.Root, "address": c.Address, "daemon.socket": c.Daemon.Socket, "daemon.root": c.Daemon.Root} {
		find(!filepath.IsAbs(path), "%s: %q is no absolute path", key, path)
	}
	for key, path := range map[string]string{"address": c.Address, "daemon.socket": c.Daemon.Socket} {
		find(len(path) > maxSocket, "%s: a socket's path has at most %d bytes", key, maxSocket)
	}
	find(!slices.Contains([]string{modeStart, modeConnect}, c.Daemon.Mode), "daemon.mode: %q is none of start, connect", c.Daemon.Mode)
	find(!slices.Contains([]snapshotter.Scope{snapshotter.ScopeAll, snapshotter.ScopeNamespace, snapshotter.ScopeImage}, c.Images.Share),
		"images.share: %q is none of all, namespace, image", c.Images.Share)
	find(!slices.Contains([]string{"", "docker"}, c.Backend.Credentials), "backend.credentials: %q is neither docker nor empty", c.Backend.Credentials)
	slices.SortFunc(errs, func(a, b error) int { return bytes.Compare([]byte(a.Error()), []byte(b.Error())) })
	return errors.Join(errs...)
}
