package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/erofsd/erofsd/internal/keychain"
)

// configOf reads a configuration with this text.
func configOf(t *testing.T, text string, as origin) (config, []string, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return loadConfig(name, as)
}

// checkWarnings wants one warning about each key.
func checkWarnings(t *testing.T, got []string, want ...string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d warnings, want %d:\n%s", len(got), len(want), strings.Join(got, "\n"))
		return
	}
	for i, w := range want {
		if !strings.HasPrefix(got[i], w+" ") {
			t.Errorf("warning %q is not about %s", got[i], w)
		}
	}
}

// TestNydusConfig reads the file of an installation with fscache.
func TestNydusConfig(t *testing.T) {
	got, warnings, err := loadConfig("testdata/nydus-fscache.toml", origin{nydusName: true})
	if err != nil {
		t.Fatal(err)
	}
	want := defaultConfig()
	want.Root, want.Address = "/data/containerd-nydus", nydusAddress
	want.Log = logConfig{Level: "debug", Format: "text", File: "/data/containerd-nydus/logs/nydus-snapshotter.log", RotationMiB: 100, Keep: 6}
	want.System.Address, want.Metrics.Address = nydusSystem, ":9110"
	want.Daemon.Socket = "/run/containerd-nydus/erofsd.sock"
	want.Daemon.Root = "/data/containerd-nydus/cache/erofsd"
	want.Backend.Template, want.Backend.SkipVerify = "/etc/nydus/nydusd-config.fscache.json", true
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	checkWarnings(t, warnings, "cgroup.enable", "daemon.log_rotation_size", "daemon.nydusd_path", "daemon.nydusimage_path", "daemon.threads_number",
		"log.log_rotation_local_time", "log.log_rotation_max_age", "system.debug.daemon_cpu_profile_duration_secs")
}

// TestNydusKeys wants each key used, without effect and said so, or refused.
func TestNydusKeys(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		text    string
		used    func(config) bool
		warning string // the key that it is about
		refusal string // a part of the error
	}{
		{text: `root = "/r"`, used: func(c config) bool { return c.Root == "/r" && c.Log.File == "/r/logs/nydus-snapshotter.log" }},
		{text: `address = "/a.sock"`, used: func(c config) bool { return c.Address == "/a.sock" }},
		{text: "uid = 5\ngid = 6", used: func(c config) bool { return c.UID == 5 && c.GID == 6 }},
		{text: `uid = "me"`, refusal: "uid: me is no whole number"},
		{text: `daemon_mode = "dedicated"`, warning: "daemon_mode"},
		{text: `daemon_mode = "none"`, warning: "daemon_mode"},
		{text: "daemon_mode = \"none\"\ndaemon.fs_driver = \"fusedev\"", refusal: "daemon.mode = \"connect\""},
		{text: `daemon_mode = "perhaps"`, refusal: "daemon_mode: "},
		{text: `cleanup_on_close = true`, warning: "cleanup_on_close"},
		{text: `system.address = "/s.sock"`, used: func(c config) bool { return c.System.Address == "" }},
		{text: `system = {enable = true, address = "/s.sock", uid = 5, gid = 6}`, used: func(c config) bool {
			return c.System == systemConfig{Address: "/s.sock", UID: 5, GID: 6}
		}},
		{text: `system = {enable = true, debug = {pprof_address = "127.0.0.1:9011"}}`, used: func(c config) bool { return c.System.Pprof == "127.0.0.1:9011" }},
		{text: `system = {enable = true, debug = {pprof_address = ":9011"}}`, refusal: "open to other machines"},
		{text: `system.debug.daemon_cpu_profile_duration_secs = 5`, warning: "system.debug.daemon_cpu_profile_duration_secs"},
		{text: `metrics.address = ":9110"`, used: func(c config) bool { return c.Metrics.Address == ":9110" }},
		{text: `metrics.address = "9110"`, refusal: "metrics.address"},
		{text: `metrics.collect_interval = "5s"`, warning: "metrics.collect_interval"},
		{text: `cgroup = {enable = true, memory_limit = "1GiB"}`, refusal: "MemoryMax="},
		{text: `cgroup.memory_limit = "1GiB"`, used: func(config) bool { return true }},
		{text: `daemon.nydusd_path = "/opt/erofsd"`, used: func(c config) bool { return c.Daemon.Executable == "/opt/erofsd" }},
		{text: `daemon.fs_driver = "blockdev"`, refusal: "daemon.fs_driver: "},
		{text: `daemon.fs_driver = "fusedev"`, warning: "daemon.fs_driver"},
		{text: `daemon.recover_policy = "none"`, used: func(c config) bool { return c.Daemon.RecoverPolicy == recoverNone }},
		{text: `daemon.recover_policy = "later"`, refusal: "daemon.recover_policy: "},
		{text: `daemon.threads_number = 1025`, refusal: "0 to 1024"},
		{text: `daemon.failover_policy = "flush"`, warning: "daemon.failover_policy"},
		{text: `cache_manager.cache_dir = "/c"`, used: func(c config) bool { return c.Daemon.Root == "/c/erofsd" }},
		{text: `cache_manager.gc_period = "1h"`, warning: "cache_manager.gc_period"},
		{text: `log.log_to_stdout = true`, used: func(c config) bool { return c.Log.File == "" }},
		{text: `log.dir = "/l"`, used: func(c config) bool { return c.Log.File == "/l/nydus-snapshotter.log" }},
		{text: `log.level = "warning"`, used: func(c config) bool { return c.Log.Level == "warn" }},
		{text: `log.level = "loud"`, refusal: "log.level: "},
		{text: `log.log_rotation_max_size = -1`, refusal: "log.rotation_mib"},
		{text: `log.log_rotation_compress = false`, warning: "log.log_rotation_compress"},
		{text: `remote.convert_vpc_registry = true`, warning: "remote.convert_vpc_registry"},
		{text: `remote.mirrors_config.dir = "` + dir + `"`, used: func(c config) bool { return c.Backend.HostsDir == dir }},
		{text: `remote.mirrors_config.dir = "` + dir + `/missing"`, refusal: "remote.mirrors_config.dir: "},
		{text: "remote.auth.enable_kubeconfig_keychain = true\nremote.auth.kubeconfig_path = \"/k\"", used: func(c config) bool {
			return slices.Equal(c.Credentials.Providers, []string{fromDocker, fromSecrets}) &&
				c.Credentials.Secrets.Kubeconfig == "/k" && slices.Equal(c.Credentials.Secrets.Namespaces, []string{"*"})
		}},
		{text: "remote.auth.enable_cri_keychain = true\nremote.auth.image_service_address = \"/i\"", used: func(c config) bool {
			return slices.Equal(c.Credentials.Providers, []string{fromCRI, fromDocker}) && c.Credentials.CRI.Address == "/i"
		}},
		{text: "remote.auth.enable_kubelet_credential_providers = true\nremote.auth.credential_provider_config = \"/c\"\nremote.auth.credential_provider_bin_dir = \"/b\"", used: func(c config) bool {
			return slices.Equal(c.Credentials.Providers, []string{fromDocker, fromKubelet}) && c.Credentials.Kubelet == kubeletConfig{Config: "/c", Plugins: "/b"}
		}},
		{text: `remote.auth.enable_kubelet_credential_providers = true`, refusal: "credentials.kubelet.config"},
		{text: `remote.auth.credential_renewal_interval = "1h"`, used: func(c config) bool { return c.Credentials.Renew == "1h" }},
		{text: `remote.auth.credential_renewal_interval = "soon"`, refusal: "credentials.renew"},
		{text: `snapshot.enable_nydus_overlayfs = true`, refusal: "Kata"},
		{text: `snapshot.enable_kata_volume = true`, refusal: "Kata"},
		{text: `snapshot.sync_remove = true`, warning: "snapshot.sync_remove"},
		{text: `snapshot.enable_overlayfs_volatile = true`, used: func(c config) bool { return len(c.Snapshots.OverlayOptions) == 1 }},
		{text: `image.validate_signature = true`, refusal: "image.validate_signature: "},
		{text: `experimental.enable_stargz = true`, warning: "experimental.enable_stargz"},
		{text: `experimental.tarfs.export_mode = "image_block"`, refusal: "export_mode"},
		{text: `experimental.tarfs.enable_tarfs = "yes"`, refusal: "no true or false"},
		{text: `tomorrow.key = 1`, warning: "tomorrow.key"},
	} {
		text := c.text
		if !strings.Contains(text, "fs_driver") {
			text += "\ndaemon.fs_driver = \"fscache\""
		}
		got, warnings, err := configOf(t, "version = 1\n"+text, origin{})
		switch {
		case c.refusal != "":
			if err == nil || !strings.Contains(err.Error(), c.refusal) {
				t.Errorf("%s: error %v, want %q", c.text, err, c.refusal)
			}
		case err != nil:
			t.Errorf("%s: %v", c.text, err)
		case c.warning != "":
			checkWarnings(t, warnings, c.warning)
		default:
			checkWarnings(t, warnings)
			if !c.used(got) {
				t.Errorf("%s has no effect: %+v", c.text, got)
			}
		}
	}
}

// TestWhoseConfig tells the formats apart.
func TestWhoseConfig(t *testing.T) {
	own, _, err := configOf(t, `daemon.mode = "connect"`, origin{nydusName: true})
	if err != nil || own.Daemon.Mode != modeConnect || own.Root != nydusRoot || own.Address != nydusAddress {
		t.Errorf("our own by the other name: %+v, %v", own, err)
	}
	if _, _, err := configOf(t, `daemon_mode = "shared"`, origin{nydusName: true}); err == nil || !strings.Contains(err.Error(), "daemon_mode") {
		t.Errorf("without a version a key of nydus-snapshotter's is %v", err)
	}
	if _, _, err := configOf(t, "version = 2\n", origin{}); err == nil || !strings.Contains(err.Error(), "version: 2") {
		t.Errorf("version 2: %v", err)
	}
	none, _, err := loadConfig("", origin{})
	if err != nil || none.Root != defaultConfig().Root {
		t.Errorf("no file: %+v, %v", none, err)
	}
	none, _, err = loadConfig("", origin{nydusName: true})
	if err != nil || none.Root != nydusRoot || none.Address != nydusAddress || none.Log.File == "" {
		t.Errorf("no file by the other name: %+v, %v", none, err)
	}
}

// TestNydusFlags has flags win over the file.
func TestNydusFlags(t *testing.T) {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	addNydusFlags(flags)
	given := []string{
		"--root=/f", "--address", "/f.sock", "--log-level", "error", "--log-to-stdout=false", "--fs-driver", "fscache", "--nydusd-config", "/t.json",
		"--shared-daemon", "--nydusd-path", "/opt/erofsd", "--nydusd-thread-num", "0", "--cache-dir", "/c", "--nydus-image", "",
	}
	if err := flags.Parse(given); err != nil {
		t.Fatal(err)
	}
	as := originOf("/usr/bin/containerd-nydus-grpc", flags)
	got, warnings, err := configOf(t, "version = 1\nroot = \"/r\"\nlog.log_to_stdout = true\n", as)
	if err != nil {
		t.Fatal(err)
	}
	checkWarnings(t, warnings)
	if got.Root != "/f" || got.Address != "/f.sock" || got.Log.Level != "error" || got.Log.File == "" || got.Backend.Template != "/t.json" ||
		got.Daemon.Executable != "/opt/erofsd" || got.Daemon.Root != "/c/erofsd" {
		t.Errorf("flags %q give %+v", given, got)
	}
	if _, _, err := configOf(t, "", as); err == nil || !strings.Contains(err.Error(), "fs-driver") {
		t.Errorf("flags of nydus-snapshotter with our own configuration: %v", err)
	}
}

// TestFscacheTemplate is the form in which nydus-snapshotter has its template for fscache.
func TestFscacheTemplate(t *testing.T) {
	c := defaultConfig()
	c.Backend.Template = "../../configs/nydusd-config.fscache.json"
	got := imageOf(t, c, "registry.example/team/app:1", keychain.Login{})
	if r := got.Backend.Registry; r == nil || r.Host != "registry.example" || r.Repo != "team/app" || r.RetryLimit == nil || *r.RetryLimit != 4 {
		t.Errorf("registry %+v", r)
	}
	if p := got.Prefetch; !p.All || p.Threads != 8 {
		t.Errorf("prefetch %+v", p)
	}
	name := filepath.Join(t.TempDir(), "t.json")
	text := `{"type":"bootstrap","config":{"backend_type":"localfs","backend_config":{"dir":"/blobs"},"cache_type":"fscache"}}`
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Backend.Template = name
	if got := imageOf(t, c, "", keychain.Login{}); got.Backend.LocalFS == nil || got.Backend.LocalFS.Dir != "/blobs" {
		t.Errorf("backend %+v", got.Backend)
	}
}

// TestCheck says what has no effect, and starts nothing.
func TestCheck(t *testing.T) {
	var out bytes.Buffer
	if err := run([]string{"--config", "testdata/nydus-fscache.toml", "--check"}, &out, nil); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "warning: "); n != 8 || !strings.Contains(out.String(), "daemon.threads_number has no effect") {
		t.Errorf("%d warnings:\n%s", n, out.String())
	}
	if err := run([]string{"--config", "testdata/nydus-fscache.toml", "--check", "--daemon-mode", "none", "--fs-driver", "proxy"}, &out, nil); err == nil || !strings.Contains(err.Error(), "daemon.fs_driver") {
		t.Errorf("another driver: %v", err)
	}
}
