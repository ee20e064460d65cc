package erofsd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/logging"
)

// What the process holds is many small tables that live long, and buffers that do
// not come from the heap again and again: collecting early costs next to nothing.
const (
	gcPercent  = 50
	memoryGoal = 48 << 20 // bytes; above it the collector works harder. Not a limit
)

// logTime is how long the end waits for the log's last records.
const logTime = 2 * time.Second

// Name is what the program is called.
const Name = "erofsd"

// IsCalled reports whether another program that has erofsd in it was started as erofsd: by
// its name, or as one of its processes. Ask before anything else, and then call Main.
func IsCalled(args []string) bool {
	return filepath.Base(args[0]) == Name || daemon.IsHelper(args) || daemon.IsGuard(args)
}

// Main is the program, whichever of its processes this is. It returns the exit code. Call it
// before anything else is done: what the process was given is told from what it has opened.
func Main() int {
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads is no reason to end, for the keeper least of all
	setName(os.Args[0])
	if daemon.IsHelper(os.Args) {
		return daemon.Helper(os.Args, os.Stdout)
	}
	if daemon.IsGuard(os.Args) {
		return daemon.Guard(os.Args)
	}
	holder, err := daemon.Connect() // before anything else is opened
	if err != nil {
		fmt.Fprintln(os.Stderr, "erofsd:", err)
		return 1
	}
	return run(os.Args, os.Environ(), holder)
}

// setName gives this process the name that people look for: one that was started by a
// descriptor would be called "exe", or by a number. It is only shown.
func setName(arg0 string) { _ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(arg0)), 0) }

// run does what a command line says and returns nydusd's exit code: 0, 1 when the daemon
// could not serve, 2 for a command line that means nothing.
func run(args, environ []string, holder *daemon.Holder) int {
	c, err := parse(args, environ)
	if err == nil && c.output != "" {
		fmt.Print(c.output)
		return 0
	}
	if err == nil && holder == nil && c.kept() {
		code, err := c.keep(args)
		if err != nil {
			fmt.Fprintln(os.Stderr, "erofsd:", err)
		}
		return code
	}
	if err == nil {
		c.holder = holder
		err = c.serve()
	}
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "erofsd:", err)
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// serve is the daemon until its end.
func (c *command) serve() (err error) {
	syscall.Umask(0o077) // sockets and cache files are for root alone, from their first moment
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryGoal)
	l := c.config.Log
	log, err := logging.New(logging.Options{
		Level: l.Level, Format: l.Format, File: l.File, RotationSize: int64(l.RotationSize), Keep: l.RotationKeep,
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && l.File != "" {
			log.Error("ends", "err", err) // who called sees it too
		}
		ctx, cancel := context.WithTimeout(context.Background(), logTime)
		defer cancel()
		err = errors.Join(err, log.Close(ctx))
	}()
	c.nydusd.SetLevel = log.SetLevel
	return c.run(log.Logger)
}

// run is the daemon with its log.
func (c *command) run(log *slog.Logger) error {
	b := daemon.BuildVersion()
	log.Info("Program Version: "+b.Version, "commit", b.Commit)
	for _, w := range c.warnings {
		log.Warn(w)
	}
	if err := setFileLimit(c.config.Daemon.RlimitNofile, c.limitGiven, log); err != nil {
		return err
	}
	daemon.RelaxTimers(log)
	o := c.options()
	o.Logger = log
	ctx, force := signals()
	var err error
	if c.holder != nil {
		o.Holder, err = c.holder, c.holder.Begin(ctx, log)
	} else {
		o.Device, err = daemon.InheritedDevice()
	}
	if err != nil {
		return err
	}
	d, err := daemon.NewControl(o, c.config.Daemon.Socket)
	if err != nil {
		return err
	}
	err = d.Run(ctx, force, c.config.Daemon.Socket)
	log.Info("nydusd quits")
	return err
}

// signals returns a context that ends with the first SIGINT or SIGTERM and one
// that ends with the second.
func signals() (first, second context.Context) {
	first, stop := context.WithCancel(context.Background())
	second, stopNow := context.WithCancel(context.Background())
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ch
		stop()
		<-ch
		stopNow()
	}()
	return first, second
}
