package erofsd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/erofsd/erofsd/internal/config"
	"github.com/erofsd/erofsd/internal/daemon"
)

// singleton is the subcommand that serves cachefiles for others that mount, as nydusd's.
const singleton = "singleton"

// maxConfig bounds nydusd's configuration file, in bytes.
const maxConfig = 16 << 20

// A command is what the command line, the configuration file and the environment say.
type command struct {
	config       config.Config
	nydusd       daemon.NydusdOptions
	single       bool
	noCompletion bool
	limitGiven   bool // the limit of descriptors
	hasty        bool // end without waiting for images that are in use, as nydusd
	keeperGiven  bool // --keeper was given
	env          environment
	holder       *daemon.Holder // nil: there is no keeper

	output   string   // print this and end
	warnings []string // for the log
}

// A usageError is a command line that means nothing: exit code 2. Everything else that
// is wrong before the daemon serves is 1.
type usageError struct{ error }

// A startError is an option's value that nydusd takes for a failed start: exit code 1.
type startError struct{ error }

// recorded is an option's value as it was given.
type recorded struct {
	value string
	def   string
	kind  string // of value, for the help; bool for a switch
}

func (r *recorded) String() string     { return r.def }
func (r *recorded) Set(v string) error { r.value = v; return nil }
func (r *recorded) Type() string       { return r.kind }

// parse reads a command line, of which the first is how the program was called, and what
// it names.
func parse(args, environ []string) (*command, error) {
	name := filepath.Base(args[0])
	asNydusd := strings.HasPrefix(name, "nydusd")
	flags := pflag.NewFlagSet(name, pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.SortFlags = false
	values := define(flags)
	help := flags.BoolP("help", "h", false, "print this")
	version := flags.BoolP("version", "V", false, "print the version")
	if err := flags.Parse(args[1:]); err != nil {
		return nil, usageError{fmt.Errorf("%w; see %s --help", err, name)}
	}
	mode := flags.Arg(0)
	c := &command{config: config.Default(), single: mode == singleton}
	switch {
	case *help || mode == "help":
		c.output = usage(flags)
		return c, nil
	case *version:
		c.output = versionText(name, daemon.BuildVersion())
		return c, nil
	}
	if err := check(flags, asNydusd); err != nil {
		return nil, err
	}
	var err error
	if c.env, err = readEnvironment(environ); err != nil {
		return nil, err
	}
	if err := c.read(values["config"].value); err != nil {
		return nil, err
	}
	if err := c.apply(flags, values); err != nil {
		return nil, err
	}
	c.asNydusd(flags, asNydusd)
	return c, nil
}

// define declares all options.
func define(flags *pflag.FlagSet) map[string]*recorded {
	values := map[string]*recorded{}
	add := func(name, short, kind, def, help string) *pflag.Flag {
		values[name] = &recorded{def: def, kind: kind}
		f := flags.VarPF(values[name], name, short, help)
		if kind == "" {
			values[name].kind, f.NoOptDefVal = "bool", "true"
		}
		return f
	}
	for _, o := range options() {
		add(o.name, o.short, o.value, o.def, o.help)
	}
	for name, o := range foreign() {
		kind := ""
		if o.value {
			kind = "VALUE"
		}
		add(name, o.short, kind, "", "").Hidden = true
	}
	return values
}

// check refuses what erofsd has not, and what does not go together.
func check(flags *pflag.FlagSet, asNydusd bool) error {
	mode := flags.Arg(0)
	switch {
	case instead(mode) != "":
		return refuse(mode, mode)
	case mode != "" && mode != singleton:
		return usageError{fmt.Errorf("unrecognized subcommand %q; see --help", mode)}
	case flags.NArg() > 1:
		return usageError{fmt.Errorf("unexpected argument %q; see --help", flags.Arg(1))}
	}
	for name, o := range foreign() {
		if flags.Changed(name) {
			return refuse("--"+name, o.mode)
		}
	}
	switch {
	case asNydusd && mode == "":
		return refuse("nydusd without a subcommand", "fuse")
	case flags.Changed("id") && !flags.Changed("supervisor"):
		return usageError{errors.New("--id needs --supervisor")}
	case flags.Changed("supervisor") && !flags.Changed("id"):
		return usageError{errors.New("--supervisor needs --id")}
	case mode == singleton && flags.Changed("fscache-tag") && !flags.Changed("fscache"):
		return usageError{errors.New("--fscache-tag needs --fscache")}
	}
	return nil
}

// read reads the configuration file, if there is one.
func (c *command) read(name string) (err error) {
	if name == "" {
		return nil
	}
	if !c.single {
		c.config, err = config.Load(name)
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(text) > maxConfig {
		err = fmt.Errorf("more than %d bytes", maxConfig)
	}
	if err == nil {
		c.nydusd.Entries, c.warnings, err = config.ParseDaemonFile(text)
	}
	if err != nil {
		return fmt.Errorf("read configuration %s: %w", name, err)
	}
	return nil
}

// apply puts the options that were given over the configuration.
func (c *command) apply(flags *pflag.FlagSet, values map[string]*recorded) error {
	for _, o := range options() {
		if o.set == nil || !flags.Changed(o.name) {
			continue
		}
		if err := o.set(c, values[o.name].value); err != nil {
			err = fmt.Errorf("--%s: %w", o.name, err)
			if errors.As(err, new(startError)) {
				return err
			}
			return usageError{err}
		}
	}
	if err := c.config.Validate(); err != nil {
		return usageError{err}
	}
	return nil
}

// asNydusd completes what nydusd and its singleton mode do otherwise than erofsd.
func (c *command) asNydusd(flags *pflag.FlagSet, called bool) {
	api := flags.Changed("apisock") || flags.Changed("socket")
	if called && !api {
		c.config.Daemon.Socket = "" // none
	}
	// Who gave nydusd's own option expects nydusd's end.
	c.hasty = c.single && (called || flags.Changed("apisock"))
	if c.single && flags.Changed("fscache") && !flags.Changed("transport") {
		c.config.Daemon.Transport = daemon.Cachefiles
	}
	c.config.Log.Level = c.env.level(c.config.Log.Level)
	c.warnings = append(c.warnings, c.env.warnings...)
	if c.env.auth != "" || len(c.env.headers) > 0 {
		c.nydusd.Adjust = c.env.adjust
	}
}

// options are the daemon's.
func (c *command) options() daemon.Options {
	d := c.config.Daemon
	o := daemon.Options{
		Root: d.Root, Transport: d.Transport, FillTimeout: time.Duration(d.FillTimeout), NoCompletion: c.noCompletion,
		Fscache: c.config.Cachefiles.Dir, FscacheTag: c.config.Cachefiles.Tag, FillThreads: c.config.Cachefiles.Threads,
		Handover: c.config.Cachefiles.Handover, Hasty: c.hasty,
		High: int64(c.config.Cache.High), Low: int64(c.config.Cache.Low),
		Default: c.config.Image, Nydusd: c.nydusd,
	}
	o.Sandbox, o.User, o.MountBelow = d.Sandbox, d.User, d.MountBelow
	o.UnixSockets = d.UnixSockets || c.single // nydusd's clients name backends that have one
	if c.config.Log.File != "" {
		o.Writable = []string{filepath.Dir(c.config.Log.File)}
	}
	o.Nydusd.Metrics = c.config.Metrics.Address
	return o
}

// usage is the text of --help.
func usage(flags *pflag.FlagSet) string {
	return `erofsd serves lazy container images to the kernel's EROFS.

Usage: erofsd [options]
       erofsd singleton [--fscache DIR] [options]
       nydusd singleton ...    the same program by nydusd's name

Without singleton it mounts images itself (erofsctl mount). As singleton it serves the
kernel's cache for others that mount, as nydus-snapshotter with fs_driver = "fscache".

` + flags.FlagUsagesWrapped(100)
}

// versionText is the text of --version: nydusd's, whose label Git Commit nydus-snapshotter
// looks for, below a line that says what it is.
func versionText(name string, b daemon.Build) string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s %s\n", name, b.Version)
	for _, line := range [][2]string{
		{"Version", b.Version},
		{"Git Commit", b.Commit},
		{"Build Time", b.Time},
		{"Profile", "release"},
		{"Rustc", runtime.Version()},
	} {
		if line[1] == "" {
			line[1] = "unknown"
		}
		fmt.Fprintf(&text, "%s: \t%s\n", line[0], line[1])
	}
	return text.String()
}
