package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/erofsd/erofsd/snapshotter"
)

// config is configs/containerd-erofsd.toml, which explains each key.
type config struct {
	Root       string           `toml:"root"`
	Address    string           `toml:"address"`
	UID        int              `toml:"uid"`
	GID        int              `toml:"gid"`
	Log        logConfig        `toml:"log"`
	System     systemConfig     `toml:"system"`
	Metrics    metricsConfig    `toml:"metrics"`
	Daemon     daemonConfig     `toml:"daemon"`
	Images     imagesConfig     `toml:"images"`
	Snapshots  snapshotsConfig  `toml:"snapshots"`
	Containerd containerdConfig `toml:"containerd"`
	Backend    backendConfig    `toml:"backend"`

	Credentials credentialsConfig `toml:"credentials"`
	Backends    []chosenBackend   `toml:"backends"`
}

type logConfig struct {
	Level       string `toml:"level"`
	Format      string `toml:"format"`
	File        string `toml:"file"`
	RotationMiB int64  `toml:"rotation_mib"`
	Keep        int    `toml:"keep"`
}

type systemConfig struct {
	Address string `toml:"address"`
	UID     int    `toml:"uid"`
	GID     int    `toml:"gid"`
	Pprof   string `toml:"pprof"`
}

type metricsConfig struct {
	Address string `toml:"address"`
}

type daemonConfig struct {
	Mode       string   `toml:"mode"`
	Socket     string   `toml:"socket"`
	Executable string   `toml:"executable"`
	Root       string   `toml:"root"`
	Config     string   `toml:"config"`
	Args       []string `toml:"args"`

	RecoverPolicy string `toml:"recover_policy"`
	Watchdog      string `toml:"watchdog"` // a duration
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
	modeStart    = "start"
	modeEmbedded = "embedded"
	modeConnect  = "connect"
)

// What becomes of a daemon that has died, in daemonConfig.
const (
	recoverNone     = "none"
	recoverRestart  = "restart"
	recoverFailover = "failover"
)

func defaultConfig() config {
	return config{
		Root:       "/var/lib/containerd/io.containerd.snapshotter.v1.erofsd",
		Address:    "/run/containerd-erofsd/containerd-erofsd-grpc.sock",
		Log:        logConfig{Level: "info", Format: "text", RotationMiB: 200, Keep: 5},
		System:     systemConfig{Address: "/run/containerd-erofsd/system.sock"},
		Daemon:     defaultDaemon(),
		Images:     imagesConfig{Share: snapshotter.ScopeAll},
		Snapshots:  snapshotsConfig{OverlayOptions: []string{}},
		Containerd: containerdConfig{Address: "/run/containerd/containerd.sock"},
		Backend:    backendConfig{Credentials: "docker", PlainHTTP: []string{}, CAFiles: []string{}},

		Credentials: defaultCredentials(),
		Backends:    []chosenBackend{},
	}
}

func defaultDaemon() daemonConfig {
	return daemonConfig{
		Mode: modeStart, Socket: "/run/erofsd/erofsd.sock", Root: "/var/lib/erofsd", Args: []string{}, RecoverPolicy: recoverFailover, Watchdog: "60s",
	}
}

// check returns all that is wrong beside the paths.
func (c daemonConfig) check() (errs []error) {
	if modes := []string{modeStart, modeEmbedded, modeConnect}; !slices.Contains(modes, c.Mode) {
		errs = append(errs, fmt.Errorf("daemon.mode: %q is none of %s", c.Mode, strings.Join(modes, ", ")))
	}
	if c.Mode == modeEmbedded && c.Executable != "" {
		errs = append(errs, fmt.Errorf("daemon.executable: %q is not used with daemon.mode = %q, where this program is erofsd; remove one of the two", c.Executable, c.Mode))
	}
	if policies := []string{recoverNone, recoverRestart, recoverFailover}; !slices.Contains(policies, c.RecoverPolicy) {
		errs = append(errs, fmt.Errorf("daemon.recover_policy: %q is none of %s", c.RecoverPolicy, strings.Join(policies, ", ")))
	}
	if c.Mode != modeConnect && len(filepath.Join(filepath.Dir(c.Socket), storeName)) > maxSocket {
		errs = append(errs, fmt.Errorf("daemon.socket: the path of the socket %s beside it would have more than %d bytes", storeName, maxSocket))
	}
	if d, err := time.ParseDuration(c.Watchdog); err != nil || d < 0 || d > 0 && d < time.Second {
		errs = append(errs, fmt.Errorf(`daemon.watchdog: %q is no time such as "60s", of a second at least, or "0s" for none`, c.Watchdog))
	}
	return errs
}

// loadConfig reads a configuration file, ours or nydus-snapshotter's, over the defaults; ""
// is none. The warnings are about what nydus-snapshotter's has and this program does not do.
func loadConfig(name string, as origin) (c config, warnings []string, err error) {
	var text []byte
	if name != "" {
		if text, err = os.ReadFile(name); err != nil {
			return c, nil, fmt.Errorf("read configuration: %w", err)
		}
	}
	document := map[string]any{}
	err = decoded(toml.Unmarshal(text, &document))
	switch {
	case err != nil:
	case as.isNydus(document, name):
		c, warnings, err = nydusConfig(document, as.flags)
	default:
		c, err = ownConfig(text, as)
	}
	if err == nil {
		err = c.validate()
	}
	if err != nil {
		return c, nil, fmt.Errorf("read configuration %s: %w", name, err)
	}
	return c, warnings, nil
}

// ownConfig reads our own format; a key that is not known is an error.
func ownConfig(text []byte, as origin) (config, error) {
	c := defaultConfig()
	if as.nydusName {
		c.Root, c.Address, c.System.Address = nydusRoot, nydusAddress, nydusSystem
	}
	if len(as.flags) > 0 {
		return c, fmt.Errorf("%s: only with nydus-snapshotter's configuration (version = 1); here they are keys", strings.Join(slices.Sorted(maps.Keys(as.flags)), ", "))
	}
	return c, decoded(toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&c))
}

// decoded gives an error of the decoder the lines that it is about.
func decoded(err error) error {
	if unknown := (*toml.StrictMissingError)(nil); errors.As(err, &unknown) {
		return fmt.Errorf("unknown keys:\n%s", unknown.String())
	}
	if bad := (*toml.DecodeError)(nil); errors.As(err, &bad) {
		return errors.New(bad.String())
	}
	return err
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
	if c.System.Address != "" {
		find(!filepath.IsAbs(c.System.Address), "system.address: %q is no absolute path", c.System.Address)
		find(len(c.System.Address) > maxSocket, "system.address: a socket's path has at most %d bytes", maxSocket)
	}
	if c.System.Pprof != "" {
		err := checkPprof(c.System.Pprof)
		find(err != nil, "system.pprof: %w", err)
	}
	if c.Metrics.Address != "" {
		_, _, err := net.SplitHostPort(c.Metrics.Address)
		find(err != nil, "metrics.address: want HOST:PORT: %w", err)
	}
	find(min(c.System.UID, c.System.GID) < 0, "system.uid, system.gid: %d and %d are no ids", c.System.UID, c.System.GID)
	find(c.UID < 0 || c.GID < 0, "uid, gid: %d and %d are no ids", c.UID, c.GID)
	find(c.Log.File != "" && !filepath.IsAbs(c.Log.File), "log.file: %q is no absolute path", c.Log.File)
	find(c.Log.RotationMiB < 0 || c.Log.RotationMiB > 1<<20, "log.rotation_mib: want 0 to %d", 1<<20)
	find(!slices.Contains([]snapshotter.Scope{snapshotter.ScopeAll, snapshotter.ScopeNamespace, snapshotter.ScopeImage}, c.Images.Share),
		"images.share: %q is none of all, namespace, image", c.Images.Share)
	find(!slices.Contains([]string{"", "docker"}, c.Backend.Credentials), "backend.credentials: %q is neither docker nor empty", c.Backend.Credentials)
	errs = append(errs, c.Daemon.check()...)
	errs = append(errs, c.Credentials.check()...)
	errs = append(errs, checkBackends(c.Backends)...)
	slices.SortFunc(errs, func(a, b error) int { return bytes.Compare([]byte(a.Error()), []byte(b.Error())) })
	return errors.Join(errs...)
}
