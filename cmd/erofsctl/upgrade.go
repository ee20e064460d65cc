package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/api"
)

const (
	upgradeTime  = 30 * time.Second // until the successor must answer
	upgradeEvery = 50 * time.Millisecond
)

func upgradeCommand() *cli.Command {
	return &cli.Command{
		Name:      "upgrade",
		Usage:     "replace the running daemon by another version, with its images mounted and read",
		ArgsUsage: "[EROFSD]",
		Description: "EROFSD is the executable of the new version; without it the daemon's own is started again, in the\n" +
			"version that is installed in its place by now. One that does not start is dropped, and the daemon goes on.",
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.Args().Len() > 1 {
				return errors.New("upgrade: want at most one executable")
			}
			exe := c.Args().First()
			if exe != "" {
				var err error
				if exe, err = filepath.Abs(exe); err != nil {
					return fmt.Errorf("upgrade: %w", err)
				}
			}
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			before, err := client.Version(ctx)
			if err != nil {
				return err
			}
			if err := client.Upgrade(ctx, api.UpgradeRequest{Executable: exe}); err != nil {
				return err
			}
			after, err := successor(ctx, client, before.PID)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.Root().Writer, "version %s (process %d) took over from %s (process %d)\n", after.Version, after.PID, before.Version, before.PID)
			return nil
		},
	}
}

// successor waits until another process than before answers.
func successor(ctx context.Context, client *api.Client, before int) (api.VersionInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, upgradeTime)
	defer cancel()
	for {
		v, err := client.Version(ctx)
		if err == nil && v.PID != before {
			return v, nil
		}
		select {
		case <-time.After(upgradeEvery):
		case <-ctx.Done():
			return v, errors.Join(errors.New("upgrade: the successor does not answer; the keeper tries again, see the daemon's log"), err)
		}
	}
}
