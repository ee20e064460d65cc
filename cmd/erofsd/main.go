// Command erofsd is the daemon: it mounts lazy images through the kernel's
// EROFS and brings their data when they are read.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/erofsd/erofsd/internal/daemon"
)

// What the process holds is many small tables that live long, and buffers that do
// not come from the heap again and again: collecting early costs next to nothing.
const (
	gcPercent  = 50
	memoryGoal = 48 << 20 // bytes; above it the collector works harder. Not a limit
)

func main() {
	if daemon.IsHelper(os.Args) {
		os.Exit(daemon.Helper(os.Args, os.Stdout))
	}
	if daemon.IsGuard(os.Args) {
		os.Exit(daemon.Guard(os.Args))
	}
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "erofsd:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	o, err := parse(args, os.Stderr)
	if err != nil {
		return err
	}
	if o.version {
		fmt.Println("erofsd", daemon.Version())
		return nil
	}
	syscall.Umask(0o077) // sockets and cache files are for root alone, from their first moment
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryGoal)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: o.level}))
	daemon.RaiseFileLimit(log)
	daemon.RelaxTimers(log)
	o.daemon.Logger = log
	if o.daemon.Device, err = daemon.InheritedDevice(); err != nil {
		return err
	}
	d, err := daemon.New(o.daemon)
	if err != nil {
		return err
	}
	ctx, force := signals()
	return d.Run(ctx, force, o.socket)
}

// signals returns a context that ends with the first SIGINT or SIGTERM and one
// that ends with the second.
func signals() (first, second context.Context) {
	first, stop := context.WithCancel(context.Background())
	second, stopNow := context.WithCancel(context.Background())
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM)
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads is no reason to end
	go func() {
		<-ch
		stop()
		<-ch
		stopNow()
	}()
	return first, second
}
