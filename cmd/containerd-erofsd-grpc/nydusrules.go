package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
)

// nydusRules are all keys of nydus-snapshotter's config.toml.
func nydusRules() map[string]rule {
	rules := map[string]rule{}
	for _, part := range []map[string]rule{serviceRules(), daemonRules(), logRules(), remoteRules(), snapshotRules(), experimentalRules()} {
		maps.Copy(rules, part)
	}
	return rules
}

// text is a key with the text of a field.
func text(field func(*config) *string) rule {
	return used(func(c *config, v string) error {
		if v != "" { // which is "not said" there
			*field(c) = v
		}
		return nil
	})
}

// number is a key with the number of a field.
func number(field func(*config) *int) rule {
	return used(func(c *config, v int64) error {
		*field(c) = int(v)
		return nil
	})
}

func serviceRules() map[string]rule {
	return map[string]rule{
		"version": used(func(_ *config, v int64) error {
			if v != 1 {
				return fmt.Errorf("%d is not known; nydus-snapshotter's is 1, and our own configuration has none", v)
			}
			return nil
		}),
		"root":             text(func(c *config) *string { return &c.Root }),
		"address":          text(func(c *config) *string { return &c.Address }),
		"uid":              number(func(c *config) *int { return &c.UID }),
		"gid":              number(func(c *config) *int { return &c.GID }),
		"daemon_mode":      known(unused("one erofsd serves all images", "shared", ""), "", "dedicated", "multiple", "shared", "none"),
		"cleanup_on_close": unused("images stay mounted when the snapshotter ends, because containers read from them", false),

		"system.enable":  used(func(*config, bool) error { return nil }), // completeNydus
		"system.address": text(func(c *config) *string { return &c.System.Address }),
		"system.uid":     number(func(c *config) *int { return &c.System.UID }),
		"system.gid":     number(func(c *config) *int { return &c.System.GID }),
		"system.debug.daemon_cpu_profile_duration_secs": unused("erofsd is not profiled when it starts", int64(0)),
		"system.debug.pprof_address":                    text(func(c *config) *string { return &c.System.Pprof }),
		"metrics.address":                               text(func(c *config) *string { return &c.Metrics.Address }),
		"metrics.hung_io_interval":                      unused("erofsd's own metrics have the requests that wait", "", "10s"),
		"metrics.collect_interval":                      unused("figures are read when they are asked for", "", "1m"),

		"cgroup.enable":       unused("erofsd stays in the snapshotter's cgroup", false),
		"cgroup.memory_limit": used(func(*config, string) error { return nil }), // completeNydus
	}
}

func daemonRules() map[string]rule {
	return map[string]rule{
		"daemon.nydusd_config": text(func(c *config) *string { return &c.Backend.Template }),
		"daemon.nydusd_path": func(c *config, v any) (string, error) {
			path, err := as[string](v)
			if err != nil || path == "" {
				return "", err
			}
			if filepath.Base(path) == "erofsd" {
				c.Daemon.Executable = path
				return "", nil
			}
			return "erofsd is started, which is beside this program or in PATH", nil
		},
		"daemon.nydusimage_path": unused("nothing is converted here", ""),
		"daemon.fs_driver": known(refused("only images that the kernel's EROFS mounts are served", "", "fscache", "fusedev"),
			"", "fscache", "fusedev", "blockdev", "nodev", "proxy"),
		"daemon.recover_policy": text(func(c *config) *string { return &c.Daemon.RecoverPolicy }),
		"daemon.threads_number": func(_ *config, v any) (string, error) {
			n, err := as[int64](v)
			switch {
			case err != nil:
				return "", err
			case n < 0 || n > 1024:
				return "", fmt.Errorf("want 0 to 1024, not %d", n)
			case n == 0:
				return "", nil
			}
			return "erofsd serves as many reads at once as there are", nil
		},
		"daemon.log_rotation_size": unused[int64]("erofsd's log goes to the snapshotter's standard error"),
		"daemon.failover_policy":   known(unused("it is about FUSE", "", "resend"), "", "none", "resend", "flush"),
		"cache_manager.disable":    unused("what no image needs goes with the image", false),
		"cache_manager.gc_period":  unused("what no image needs goes with the image, at once", "", "24h"),
		"cache_manager.cache_dir":  used(func(*config, string) error { return nil }), // completeNydus
	}
}

func logRules() map[string]rule {
	return map[string]rule{
		"log.log_to_stdout": used(func(*config, bool) error { return nil }), // completeNydus
		"log.level": used(func(c *config, v string) error {
			if v == "" {
				return nil
			}
			level, ok := map[string]string{"trace": "trace", "debug": "debug", "info": "info", "warn": "warn", "warning": "warn", "error": "error", "fatal": "error", "panic": "error"}[v]
			if !ok {
				return fmt.Errorf("%q is no level", v)
			}
			c.Log.Level = level
			return nil
		}),
		"log.dir": used(func(*config, string) error { return nil }), // completeNydus
		"log.log_rotation_max_size": used(func(c *config, v int64) error {
			c.Log.RotationMiB = v
			return nil
		}),
		"log.log_rotation_max_backups": number(func(c *config) *int { return &c.Log.Keep }),
		"log.log_rotation_max_age":     unused("old logs go by their number, log_rotation_max_backups", int64(0)),
		"log.log_rotation_local_time":  unused("the names of old logs have the time in UTC", false),
		"log.log_rotation_compress":    unused("old logs are compressed", true),
	}
}

func remoteRules() map[string]rule {
	return map[string]rule{
		"remote.convert_vpc_registry": unused("it has none in nydus-snapshotter either", false),
		"remote.skip_ssl_verify": used(func(c *config, v bool) error {
			c.Backend.SkipVerify = v
			return nil
		}),
		"remote.mirrors_config.dir": used(func(c *config, v string) error {
			if v == "" {
				return nil
			}
			c.Backend.HostsDir = v
			if _, err := os.Stat(v); err != nil {
				return errors.Join(errors.New("there must be such a directory"), err)
			}
			return nil
		}),
		"remote.auth.enable_kubeconfig_keychain":          used(func(*config, bool) error { return nil }), // completeNydus
		"remote.auth.kubeconfig_path":                     text(func(c *config) *string { return &c.Credentials.Secrets.Kubeconfig }),
		"remote.auth.enable_cri_keychain":                 used(func(*config, bool) error { return nil }), // completeNydus
		"remote.auth.image_service_address":               text(func(c *config) *string { return &c.Credentials.CRI.Address }),
		"remote.auth.enable_kubelet_credential_providers": used(func(*config, bool) error { return nil }), // completeNydus
		"remote.auth.credential_provider_config":          text(func(c *config) *string { return &c.Credentials.Kubelet.Config }),
		"remote.auth.credential_provider_bin_dir":         text(func(c *config) *string { return &c.Credentials.Kubelet.Plugins }),
		"remote.auth.credential_renewal_interval":         text(func(c *config) *string { return &c.Credentials.Renew }),
	}
}

func snapshotRules() map[string]rule {
	return map[string]rule{
		"snapshot.enable_nydus_overlayfs": refused("there is no such mount helper; containers of Kata would not find their images", false),
		"snapshot.nydus_overlayfs_path":   unused("there is no such mount helper", ""),
		"snapshot.enable_kata_volume":     refused("containers of Kata would not find their images", false),
		"snapshot.sync_remove":            unused("files are removed in the background; containerd's Cleanup waits for that", false),
		"snapshot.enable_overlayfs_volatile": used(func(c *config, v bool) error {
			if v {
				c.Snapshots.OverlayOptions = append(c.Snapshots.OverlayOptions, "volatile")
			}
			return nil
		}),
		"image.public_key_file":    unused("signatures are not asked for", ""),
		"image.validate_signature": refused("signatures are not verified; images without one would be served", false),
	}
}

func experimentalRules() map[string]rule {
	const unpacked = "such images are unpacked as ordinary ones"
	return map[string]rule{
		"experimental.enable_stargz":             unused(unpacked, false),
		"experimental.enable_referrer_detect":    unused("no nydus image is looked for beside an ordinary one: "+unpacked, false),
		"experimental.enable_index_detect":       unused("no nydus image is looked for beside an ordinary one: "+unpacked, false),
		"experimental.enable_backend_source":     unused("erofsd gets what it needs by its API, and keeps it in memory", false),
		"experimental.tarfs.enable_tarfs":        unused(unpacked, false),
		"experimental.tarfs.mount_tarfs_on_host": unused(unpacked, false),
		"experimental.tarfs.tarfs_hint":          unused(unpacked, false),
		"experimental.tarfs.max_concurrent_proc": unused(unpacked, int64(0)),
		"experimental.tarfs.export_mode":         refused("no block images are made; containers of Kata would not find them", ""),
	}
}
