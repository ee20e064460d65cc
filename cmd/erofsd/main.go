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
	"time"

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
	if err := run(os.Args[1:]); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "erofsd:", err)
		}
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("erofsd", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), "erofsd serves lazy container images to the kernel's EROFS.\n\nUsage: erofsd [flags]\n\n")
		flags.PrintDefaults()
	}
	root := flags.String("root", "/var/lib/erofsd", "`directory` of the cache, on ext4, XFS or btrfs")
	socket := flags.String("socket", "/run/erofsd/erofsd.sock", "unix `socket` of the control API")
	noCompletion := flags.Bool("no-completion", false, "do not fetch the rest of an image in the background")
	timeout := flags.Duration("fill-timeout", time.Minute, "`time` after which a read that gets no data fails with EIO")
	level := slog.LevelInfo
	flags.TextVar(&level, "log-level", level, "least `level` that is logged: debug, info, warn, error")
	version := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q; see erofsd -help", flags.Arg(0))
	}
	if *version {
		fmt.Println("erofsd", daemon.Version())
		return nil
	}
	syscall.Umask(0o077) // sockets and cache files are for root alone, from their first moment
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryGoal)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	daemon.RaiseFileLimit(log)
	d, err := daemon.New(daemon.Options{Root: *root, Logger: log, NoCompletion: *noCompletion, FillTimeout: *timeout})
	if err != nil {
		return err
	}
	ctx, force := signals()
	return d.Run(ctx, force, *socket)
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
