package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
)

// singleton is the subcommand that serves cachefiles and nothing else, as nydusd's.
const singleton = "singleton"

// maxThreads bounds --fscache-threads, as nydusd does.
const maxThreads = 1024

// options is a command line.
type options struct {
	daemon  daemon.Options
	socket  string
	level   slog.Level
	version bool
}

// parse reads a command line; usage goes to out.
func parse(args []string, out io.Writer) (*options, error) {
	o := &options{}
	single := len(args) > 0 && args[0] == singleton
	name := "erofsd"
	if single {
		name, args = name+" "+singleton, args[1:]
	}
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(out)
	flags.Usage = func() {
		fmt.Fprint(out, "erofsd serves lazy container images to the kernel's EROFS.\n\nUsage: erofsd [flags]\n       erofsd singleton --fscache DIR [flags]\n\n")
		flags.PrintDefaults()
	}
	o.common(flags)
	if single {
		o.daemon.Transport = daemon.Cachefiles
	} else {
		flags.StringVar(&o.daemon.Transport, "transport", daemon.Auto, "`way` to the kernel: fanotify, cachefiles, or auto, which takes the first that works")
	}
	o.fscache(flags)
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q; see %s -help", flags.Arg(0), name)
	}
	if single && o.daemon.Fscache == "" && !o.version {
		return nil, errors.New("singleton: want --fscache DIR, the directory of the kernel's cache")
	}
	return o, o.check()
}

func (o *options) common(flags *flag.FlagSet) {
	flags.StringVar(&o.daemon.Root, "root", "/var/lib/erofsd", "`directory` of metadata and, for fanotify, the cache, on ext4, XFS or btrfs")
	flags.StringVar(&o.socket, "socket", "/run/erofsd/erofsd.sock", "unix `socket` of the control API")
	flags.BoolVar(&o.daemon.NoCompletion, "no-completion", false, "do not fetch the rest of an image in the background")
	flags.DurationVar(&o.daemon.FillTimeout, "fill-timeout", time.Minute, "`time` after which a read that gets no data fails with EIO")
	flags.Func("cache-high", "remove images that are not in use when the cache takes more than `SIZE` (10GiB); 0 means no limit", size(&o.daemon.High))
	flags.Func("cache-low", "until it takes no more than `SIZE`; default nine tenths of --cache-high", size(&o.daemon.Low))
	flags.TextVar(&o.level, "log-level", slog.LevelInfo, "least `level` that is logged: debug, info, warn, error")
	flags.BoolVar(&o.version, "version", false, "print the version and exit")
}

func (o *options) fscache(flags *flag.FlagSet) {
	flags.StringVar(&o.daemon.Fscache, "fscache", "", "cachefiles: `directory` of the kernel's cache; default fscache below the root")
	flags.StringVar(&o.daemon.FscacheTag, "fscache-tag", "", "cachefiles: `name` of the kernel's cache; default erofsd. Keep it the same: mounts of a dead daemon stay dead with another")
	flags.IntVar(&o.daemon.FillThreads, "fscache-threads", maxThreads, "cachefiles: `number` of reads that wait for data at a time")
	flags.BoolVar(&o.daemon.Handover, "handover", false,
		"cachefiles: leave images mounted at the end; the service manager keeps the device (systemd: FileDescriptorStoreMax=1) for the next daemon")
}

func (o *options) check() error {
	d := &o.daemon
	if d.FillThreads < 1 || d.FillThreads > maxThreads {
		return fmt.Errorf("--fscache-threads %d: want 1 to %d", d.FillThreads, maxThreads)
	}
	if d.Low > d.High {
		return fmt.Errorf("--cache-low %d is more than --cache-high %d", d.Low, d.High)
	}
	if d.Fscache == "" {
		return nil
	}
	dir, err := filepath.Abs(d.Fscache)
	d.Fscache = dir
	return err
}

// size returns a parser of sizes: a number of bytes, or with KiB, MiB, GiB or TiB.
func size(n *int64) func(string) error {
	return func(s string) error {
		number, shift := s, 0
		for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
			if rest, ok := strings.CutSuffix(s, unit); ok {
				number, shift = rest, 10*(i+1)
			}
		}
		v, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
		if err != nil || v < 0 || v > 1<<62>>shift {
			return errors.New("want a size as 10GiB")
		}
		*n = v << shift
		return nil
	}
}
