package erofsd

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/keeper"
)

// kept reports whether a keeper is to run the daemon.
func (c *command) kept() bool {
	switch {
	case c.nydusd.Supervisor != "" || c.nydusd.Upgrade || c.config.Cachefiles.Handover:
		return false // somebody else is the keeper
	case c.single:
		return c.config.Daemon.Keeper && c.keeperGiven
	}
	return c.config.Daemon.Keeper
}

// keep is the keeper of the daemon that c is about: it starts this program again with the
// same arguments, as its worker, and returns the worker's exit code.
func (c *command) keep(args []string) (int, error) {
	return keeper.Run(context.Background(), keeper.Options{
		Command: func(exe string) *exec.Cmd {
			if exe == "" {
				exe = "/proc/self/exe"
			}
			cmd := exec.Command(exe, args[1:]...)
			cmd.Args[0] = args[0]
			cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
			return cmd
		},
		Logger:       slog.New(slog.NewTextHandler(os.Stderr, nil)), // the log file is the worker's
		StateVersion: daemon.StateVersion,
		HangTimeout:  time.Duration(c.config.Daemon.HangTimeout),
	})
}
