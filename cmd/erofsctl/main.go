// Command erofsctl converts, mounts and looks into lazy images.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/daemon"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().Run(ctx, os.Args); err != nil {
		code := 1
		if exit := cli.ExitCoder(nil); errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		if err.Error() != "" {
			fmt.Fprintln(os.Stderr, "erofsctl:", err)
		}
		stop()
		os.Exit(code)
	}
}

func command() *cli.Command {
	return &cli.Command{
		Name:    "erofsctl",
		Usage:   "convert, mount and look into lazy container images",
		Version: daemon.Version(),
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "daemon", Value: "/run/erofsd/erofsd.sock", Usage: "unix `SOCKET` of erofsd", Sources: cli.EnvVars("EROFSD_SOCKET")},
			&cli.StringFlag{Name: "snapshotter", Value: "/run/containerd-erofsd/system.sock", Usage: "unix `SOCKET` of the snapshotter's system API", Sources: cli.EnvVars("EROFSD_SNAPSHOTTER_SOCKET")},
		},
		Commands: []*cli.Command{
			convertCommand(), mountCommand(), unmountCommand(), removeCommand(), statusCommand(), explainCommand(),
			bindCommand(), unbindCommand(), prefetchCommand(), pinCommand(), usageCommand(), evictCommand(), scrubCommand(), upgradeCommand(),
			checkCommand(), inspectCommand(), doctorCommand(), nodeCommand(),
		},
		ExitErrHandler: func(context.Context, *cli.Command, error) {}, // main prints and exits
	}
}
