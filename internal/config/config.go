package config

import (
	"net"
	"path/filepath"
	"strings"
	"time"
)

// Config is everything a daemon is told.
type Config struct {
	Daemon     Daemon     `key:"daemon"`
	Log        Log        `key:"log"`
	Metrics    Metrics    `key:"metrics"`
	Cachefiles Cachefiles `key:"cachefiles"`
	Cache      Cache      `key:"cache"`
	Image      Image      `key:"image"` // how images get their data unless they say so themselves
}

// Daemon is about the process.
type Daemon struct {
	Root         string   `key:"root"`          // directory of metadata and, for fanotify, the cache
	Socket       string   `key:"socket"`        // of the API
	Transport    string   `key:"transport"`     // auto, fanotify or cachefiles
	FillTimeout  Duration `key:"fill_timeout"`  // a read that gets no data fails after so long
	HangTimeout  Duration `key:"hang_timeout"`  // the keeper kills a worker that gives no sign of life for so long; 0: never
	RlimitNofile int      `key:"rlimit_nofile"` // file descriptors; 0: as it is
	Keeper       bool     `key:"keeper"`        // a second process outlives the daemon and starts it again
	Sandbox      string   `key:"sandbox"`       // auto, strict or off: what the daemon gives up before it serves
	User         string   `key:"user"`          // who it becomes then; "": it stays root
	MountBelow   []string `key:"mount_below"`   // directories with all mount points; none: anywhere
	UnixSockets  bool     `key:"unix_sockets"`  // the sandbox lets it connect to any
}

// Log is where records go, and which.
type Log struct {
	Level        string `key:"level"`         // off, error, warn, info, debug or trace, in any case
	Format       string `key:"format"`        // text or json
	File         string `key:"file"`          // "": standard error
	RotationSize Size   `key:"rotation_size"` // of File; 0: it is not rotated
	RotationKeep int    `key:"rotation_keep"` // rotated files
}

// Metrics is about Prometheus.
type Metrics struct {
	Address string `key:"address"` // TCP host:port of /metrics; "": on the API's socket only
}

// Cachefiles is about the transport of that name.
type Cachefiles struct {
	Dir      string `key:"dir"`      // the kernel's cache; "": fscache below the root
	Tag      string `key:"tag"`      // its name; "": the daemon's own
	Threads  int    `key:"threads"`  // reads that wait for data at a time
	Handover bool   `key:"handover"` // leave images mounted at the end
}

// Cache bounds what is kept.
type Cache struct {
	High Size `key:"high"` // above it images that are not in use go; 0: no limit
	Low  Size `key:"low"`  // until it takes no more than this; 0: nine tenths of High
}

// Default is what a daemon does that is told nothing.
func Default() Config {
	return Config{
		Daemon: Daemon{
			Root:         "/var/lib/erofsd",
			Socket:       "/run/erofsd/erofsd.sock",
			Transport:    "auto",
			FillTimeout:  Duration(time.Minute),
			HangTimeout:  Duration(time.Minute),
			RlimitNofile: 1000000,
			Keeper:       true,
			Sandbox:      "auto",
		},
		Log:        Log{Level: "info", Format: "text", RotationKeep: 10},
		Cachefiles: Cachefiles{Threads: maxThreads},
	}
}

// Validate returns all that is wrong, joined, each a [Problem] with its key.
func (c Config) Validate() error {
	f := &findings{}
	c.check(f)
	return f.err(nil, "")
}

func (c *Config) check(f *findings) {
	c.checkDaemon(f)
	c.checkLog(f)
	if a := c.Metrics.Address; a != "" {
		if _, _, err := net.SplitHostPort(a); err != nil {
			f.add(path{"metrics", "address"}, "want host:port")
		}
	}
	if t := c.Cachefiles.Threads; t < 1 || t > maxThreads {
		f.add(path{"cachefiles", "threads"}, "want 1 to %d", maxThreads)
	}
	if t := c.Cachefiles.Tag; strings.ContainsAny(t, " \t\n/") || len(t) > 128 {
		f.add(path{"cachefiles", "tag"}, "want a name without spaces and slashes")
	}
	if c.Cache.Low > c.Cache.High {
		f.add(path{"cache", "low"}, "more than cache.high")
	}
	c.Image.check(f, path{"image"}, true)
}

func (c *Config) checkDaemon(f *findings) {
	p := path{"daemon"}
	if c.Daemon.Root == "" {
		f.missing(p.at("root"))
	}
	if c.Daemon.Socket == "" {
		f.missing(p.at("socket"))
	}
	oneOf(f, p.at("transport"), c.Daemon.Transport, "auto", "fanotify", "cachefiles")
	oneOf(f, p.at("sandbox"), c.Daemon.Sandbox, "auto", "strict", "off")
	if c.Daemon.User != "" && c.Daemon.Sandbox == "off" {
		f.add(p.at("user"), "has no effect without the sandbox")
	}
	if len(c.Daemon.MountBelow) > 0 && c.Daemon.Sandbox == "off" {
		f.add(p.at("mount_below"), "has no effect without the sandbox")
	}
	for _, dir := range c.Daemon.MountBelow {
		if !filepath.IsAbs(dir) {
			f.add(p.at("mount_below"), "want absolute paths, not %q", shown(dir))
		}
	}
	if c.Daemon.FillTimeout <= 0 {
		f.add(p.at("fill_timeout"), "want more than 0s")
	}
	if c.Daemon.RlimitNofile < 0 {
		f.add(p.at("rlimit_nofile"), "negative")
	}
}

func (c *Config) checkLog(f *findings) {
	p := path{"log"}
	oneOf(f, p.at("level"), strings.ToLower(c.Log.Level), "off", "error", "warn", "info", "debug", "trace")
	oneOf(f, p.at("format"), c.Log.Format, "text", "json")
	if c.Log.RotationKeep < 1 {
		f.add(p.at("rotation_keep"), "want at least 1")
	}
}

// oneOf finds a value that is none of those that are known.
func oneOf(f *findings, p path, value string, known ...string) {
	for _, k := range known {
		if value == k {
			return
		}
	}
	f.add(p, "unknown %s %q, want %s", p[len(p)-1], shown(value), strings.Join(known, ", "))
}
