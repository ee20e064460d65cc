package erofsd

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/erofsd/erofsd/internal/config"
)

// An option is one of the command line. Those that nydusd has, have its names.
type option struct {
	name, short string
	value       string // what stands for the value in the help; "": a switch
	help        string
	def         string // default, as the help shows it
	set         func(c *command, value string) error
}

// options are all that erofsd has, in the order of the help. They are put over what the
// configuration file says.
func options() []option {
	return slices.Concat(commonOptions(), cacheOptions(), nydusdOptions())
}

func commonOptions() []option {
	d := config.Default()
	return []option{
		{"config", "C", "FILE", "configuration: erofsd's own TOML, or with singleton nydusd's JSON with blobs", "", nil}, // read before the others
		{"root", "", "DIR", "metadata and, for fanotify, the cache, on ext4, XFS or btrfs", d.Daemon.Root, func(c *command, v string) error {
			c.config.Daemon.Root = v
			return nil
		}},
		{"socket", "", "PATH", "unix socket of the API", d.Daemon.Socket, setSocket},
		{"apisock", "A", "PATH", "the same", "", setSocket},
		{"transport", "", "WAY", "way to the kernel: fanotify, cachefiles, or auto, which takes the first that works", d.Daemon.Transport, func(c *command, v string) error {
			c.config.Daemon.Transport = v
			return nil
		}},
		{"keeper", "", "", "start the daemon again when it dies, and hand over what it had; no reader notices. --keeper=false: one process", "true, with singleton false", setKeeper},
		{"sandbox", "", "MODE", "what the daemon gives up before it serves (privileges, files, system calls): auto, as much as this kernel can; strict, all or no start; off", d.Daemon.Sandbox, func(c *command, v string) error {
			c.config.Daemon.Sandbox = v
			return nil
		}},
		{"user", "", "NAME", "become this user as well, who must be able to read what images come from; default: stay root", "", func(c *command, v string) error {
			c.config.Daemon.User = v
			return nil
		}},
		{"unix-sockets", "", "", "let the daemon connect to unix sockets that only the API names (backend http-proxy); singleton may always", "", func(c *command, _ string) error {
			c.config.Daemon.UnixSockets = true
			return nil
		}},
		{"no-completion", "", "", "do not fetch the rest of an image in the background", "", func(c *command, _ string) error {
			c.noCompletion = true
			return nil
		}},
		{"fill-timeout", "", "TIME", "a read that gets no data for so long fails with EIO", d.Daemon.FillTimeout.String(), func(c *command, v string) error {
			return c.config.Daemon.FillTimeout.UnmarshalText([]byte(v))
		}},
		{"hang-timeout", "", "TIME", "the keeper kills a daemon that gives no sign of life for so long; 0s is never", d.Daemon.HangTimeout.String(), func(c *command, v string) error {
			return c.config.Daemon.HangTimeout.UnmarshalText([]byte(v))
		}},
		{"cache-high", "", "SIZE", "remove images that are not in use when the cache takes more (10GiB); 0 is no limit", "0", func(c *command, v string) error {
			return c.config.Cache.High.UnmarshalText([]byte(v))
		}},
		{"cache-low", "", "SIZE", "until it takes no more than this; 0 is nine tenths of --cache-high", "0", func(c *command, v string) error {
			return c.config.Cache.Low.UnmarshalText([]byte(v))
		}},
		{"log-level", "l", "LEVEL", "least level that is logged: trace, debug, info, warn, error or off", d.Log.Level, setLevel},
		{"log-file", "L", "PATH", "file for the log, with .log added if the name has no extension; default standard error", "", func(c *command, v string) error {
			c.config.Log.File = v
			return nil
		}},
		{"log-rotation-size", "", "MB", "begin a new log file at this size, keep ten; 0 never does", "0", setRotation},
		{"rlimit-nofile", "", "N", "limit of file descriptors; 0 leaves it alone", strconv.Itoa(d.Daemon.RlimitNofile), setRlimit},
	}
}

func cacheOptions() []option {
	return []option{
		{"fscache", "F", "DIR", "cachefiles: the kernel's cache; default fscache below the root", "", func(c *command, v string) (err error) {
			c.config.Cachefiles.Dir, err = filepath.Abs(v)
			return err
		}},
		{"fscache-tag", "", "TAG", "cachefiles: name of the kernel's cache; default erofsd. Keep it: mounts of a dead daemon stay dead with another", "", func(c *command, v string) error {
			c.config.Cachefiles.Tag = v
			return nil
		}},
		{"fscache-threads", "", "N", "cachefiles: reads that wait for data at a time", strconv.Itoa(maxThreads), setThreads},
		{"handover", "", "", "cachefiles: leave images mounted at the end; the service manager keeps the device for the next daemon (systemd: FileDescriptorStoreMax=1)", "", func(c *command, _ string) error {
			c.config.Cachefiles.Handover = true
			return nil
		}},
	}
}

func nydusdOptions() []option {
	return []option{
		{"id", "", "ID", "name of this daemon in the API; with --supervisor", "", func(c *command, v string) error {
			c.nydusd.ID = v
			return nil
		}},
		{"supervisor", "", "PATH", "unix socket of who keeps the state for a later daemon; with --id", "", func(c *command, v string) error {
			c.nydusd.Supervisor = v
			return nil
		}},
		{"upgrade", "", "", "wait for the API's takeover and start", "", func(c *command, _ string) error {
			c.nydusd.Upgrade = true
			return nil
		}},
	}
}

// maxThreads bounds --fscache-threads, as nydusd does. It is the default: these are not
// threads but reads that wait, and with few a slow one holds up the others.
const maxThreads = 1024

func setSocket(c *command, v string) error {
	if v == "" {
		return errors.New("want a path")
	}
	c.config.Daemon.Socket = v
	return nil
}

func setKeeper(c *command, v string) error {
	on, err := strconv.ParseBool(v)
	if err != nil {
		return errors.New("want true or false")
	}
	c.config.Daemon.Keeper, c.keeperGiven = on, true
	return nil
}

func setLevel(c *command, v string) error {
	levels := []string{"trace", "debug", "info", "warn", "error", "off"}
	if !slices.Contains(levels, v) {
		return fmt.Errorf("want one of %s", strings.Join(levels, ", "))
	}
	c.config.Log.Level = v
	return nil
}

func setRotation(c *command, v string) error {
	n, err := strconv.ParseUint(v, 10, 40)
	if err != nil {
		return startError{errors.New("InvalidInput: want a number of megabytes")}
	}
	c.config.Log.RotationSize = config.Size(n << 20)
	return nil
}

func setRlimit(c *command, v string) error {
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil {
		return startError{errors.New("InvalidInput: want a number of descriptors")}
	}
	c.config.Daemon.RlimitNofile, c.limitGiven = int(n), true
	return nil
}

func setThreads(c *command, v string) error {
	n, err := strconv.ParseInt(v, 10, 32)
	if err != nil {
		return fmt.Errorf("invalid thread number configuration: %s", v)
	}
	if n < 1 || n > maxThreads {
		return fmt.Errorf("invalid thread number %d, valid range: [1-%d]", n, maxThreads)
	}
	c.config.Cachefiles.Threads = int(n)
	return nil
}
