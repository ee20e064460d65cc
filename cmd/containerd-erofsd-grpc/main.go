// Command containerd-erofsd-grpc is a snapshotter for containerd, which runs it as a proxy
// plugin: it serves lazy images, which erofsd mounts, and ordinary ones. Called erofsd it is
// that too.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	containerdlog "github.com/containerd/log"
	"github.com/spf13/pflag"

	"github.com/erofsd/erofsd/internal/erofsd"
	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/internal/fdstore"
	"github.com/erofsd/erofsd/internal/logging"
	"github.com/erofsd/erofsd/internal/nydusd"
	"github.com/erofsd/erofsd/snapshotter"
)

// logTime is how long the end waits for the log's last records.
const logTime = 2 * time.Second

func main() {
	if fdstore.IsStarter(os.Args) {
		fail(fdstore.Become(os.Args))
	}
	if erofsd.IsCalled(os.Args) {
		os.Exit(erofsd.Main())
	}
	if nydusd.IsHelper(os.Args) {
		os.Exit(nydusd.Helper(os.Args, os.Stdout))
	}
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads is no reason to end
	in, err := fdstore.Inherit()   // before anything else is opened
	if err != nil {
		fail(err)
	}
	err = run(os.Args[1:], os.Stdout, in)
	if err != nil && !errors.Is(err, pflag.ErrHelp) {
		fail(err)
	}
}

// fail ends the process.
func fail(err error) {
	fmt.Fprintln(os.Stderr, "containerd-erofsd-grpc:", err)
	os.Exit(1)
}

// run does what a command line says, with what the service manager passed.
func run(args []string, out io.Writer, in *fdstore.Inherited) (err error) {
	defer in.Close()
	flags := pflag.NewFlagSet("containerd-erofsd-grpc", pflag.ContinueOnError)
	file := flags.String("config", "", "configuration `FILE`, TOML; without it everything has its default")
	check := flags.Bool("check", false, "only say whether the configuration is right")
	version := flags.BoolP("version", "V", false, "print the version")
	addNydusFlags(flags)
	if err := flags.Parse(args); err != nil {
		return err
	}
	switch {
	case *version:
		_, err := fmt.Fprintln(out, "containerd-erofsd-grpc", buildVersion())
		return err
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q; see --help", flags.Arg(0))
	}
	c, warnings, err := loadConfig(*file, originOf(os.Args[0], flags))
	if err != nil || *check {
		return errors.Join(err, say(out, warnings))
	}
	syscall.Umask(0o077) // sockets and snapshots are for root alone, from their first moment
	log, err := logging.New(logging.Options{
		Level: c.Log.Level, Format: c.Log.Format, File: c.Log.File, RotationSize: c.Log.RotationMiB << 20, Keep: c.Log.Keep,
	})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), logTime)
		defer cancel()
		err = errors.Join(err, log.Close(ctx))
	}()
	slog.SetDefault(log.Logger)
	containerdlog.UseSlog()
	for _, w := range warnings {
		log.Warn("configuration: " + w)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return serve(ctx, c, in, log.Logger)
}

// say prints a line for each warning.
func say(out io.Writer, warnings []string) error {
	var errs []error
	for _, w := range warnings {
		_, err := fmt.Fprintln(out, "warning:", w)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// serve is the snapshotter until ctx ends. It answers containerd before the daemon is
// there: only who wants a lazy image has to wait for that.
func serve(ctx context.Context, c config, in *fdstore.Inherited, log *slog.Logger) (err error) {
	manager, err := fdstore.Dial()
	if err != nil {
		return err
	}
	defer manager.Close()
	m := newMetrics()
	d := newDaemon(c.Daemon, log, m.event)
	defer d.close()
	if c.Daemon.Mode == modeConnect {
		if d.nydusd, err = c.newNydusd(); err != nil {
			return err
		}
	}
	keys, err := c.Credentials.keyholder(log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, keys.close()) }()
	source, err := c.source(keys.Login)
	if err != nil {
		return err
	}
	opts := []snapshotter.Opt{
		snapshotter.WithRenewal(keys.renewal()),
		snapshotter.WithLogger(log), snapshotter.WithScope(c.Images.Share), snapshotter.WithOverlayOptions(c.Snapshots.OverlayOptions...),
	}
	s := system{c: c, daemon: d}
	if c.Containerd.Address != "" {
		f, err := newFinder(c.Containerd.Address)
		if err != nil {
			return err
		}
		defer f.close()
		opts = append(opts, snapshotter.WithFinder(f.find))
		s.tops = f.tops
	}
	sn, err := snapshotter.New(c.Root, d, source, opts...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	m.registry.MustRegister(reader{sn, d, time.Now()})
	server, err := listen(c, in, measured{sn, sn, m}, keys.serverOptions()...)
	if err != nil {
		return err
	}
	failpoint.Hit("grpc.listens")
	if err := d.open(ctx, in, manager); err != nil {
		return errors.Join(err, server.listener.Close())
	}
	s.images = sn
	beside, err := openWebs(c, s.handler(), m.handler())
	if err != nil {
		return errors.Join(err, server.listener.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	running.Go(func() { d.watch(ctx, sn.Recover, sn.Abandon) })
	running.Go(func() { beside.serve(ctx, log) })
	failpoint.Hit("grpc.ready")
	log.Info("serves containerd", "address", c.Address, "root", c.Root, "version", buildVersion())
	if err := manager.Notify("READY=1"); err != nil {
		log.Warn("nobody knows that it serves", "err", err)
	}
	err = server.serve(ctx)
	cancel()
	running.Wait()
	log.Info("ends; the daemon and what it has mounted stay")
	return err
}

// buildVersion is the version that the binary was built from.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
