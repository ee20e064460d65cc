package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

func mountCommand() *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "mount a lazy image; data come when they are read",
		ArgsUsage: "[IMAGE-REFERENCE] MOUNTPOINT",
		Description: "The image is a reference (host/repository:tag or @digest), with --bootstrap files: the\n" +
			"bootstrap and the directory of its blobs, or with --bound one that erofsctl bind made known.\n" +
			"With no daemon at the socket one is started in the background.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "bootstrap", Usage: "mount the image whose bootstrap is `FILE`"},
			&cli.StringFlag{Name: "bound", Usage: "mount the image that is bound as `ID`"},
			&cli.StringFlag{Name: "blob-dir", Usage: "take its blobs from `DIR`"},
			&cli.BoolFlag{Name: "plain-http", Usage: "talk HTTP to the registry, not HTTPS"},
			&cli.StringFlag{Name: "ca-file", Usage: "trust the certificate authority in `FILE` (PEM) for the registry"},
			&cli.StringFlag{Name: "domain", Usage: "share blobs only with images of domain `NAME`"},
			&cli.BoolFlag{Name: "pin", Usage: "keep the image when the cache is full"},
			&cli.StringFlag{
				Name: "transport", Value: daemon.Auto,
				Usage: "want the daemon to use `WAY`: fanotify, cachefiles, or auto: the first that works",
			},
			&cli.StringFlag{Name: "root", Value: "/var/lib/erofsd", Usage: "cache `DIR` of a daemon that has to be started"},
		},
		Action: func(ctx context.Context, c *cli.Command) error {
			req, err := mountRequest(c)
			if err != nil {
				return err
			}
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			d := daemonFlags{socket: c.String("daemon"), root: c.String("root"), transport: c.String("transport")}
			if err := ensureDaemon(ctx, client, d); err != nil {
				return err
			}
			m, err := client.Mount(ctx, req)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.Root().Writer, "mounted %s at %s\n", m.Source, m.Mountpoint)
			return nil
		},
	}
}

// mountRequest turns the command line into a request. Paths become absolute:
// the daemon has another working directory.
func mountRequest(c *cli.Command) (api.MountRequest, error) {
	args := c.Args().Slice()
	req := api.MountRequest{PlainHTTP: c.Bool("plain-http"), DomainID: c.String("domain"), Pinned: c.Bool("pin")}
	switch boot, bound := c.String("bootstrap"), c.String("bound"); {
	case boot != "" && bound == "" && len(args) == 1:
		req.Bootstrap, req.BlobDir = boot, c.String("blob-dir")
	case boot == "" && bound != "" && len(args) == 1:
		req.Image = bound
	case boot == "" && bound == "" && len(args) == 2:
		req.Reference = args[0]
	default:
		return req, errors.New("mount: want IMAGE-REFERENCE MOUNTPOINT, or --bootstrap FILE --blob-dir DIR MOUNTPOINT, or --bound ID MOUNTPOINT")
	}
	req.Mountpoint = args[len(args)-1]
	req.CAFile = c.String("ca-file")
	for _, p := range []*string{&req.Mountpoint, &req.Bootstrap, &req.BlobDir, &req.CAFile} {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return req, fmt.Errorf("mount: %w", err)
		}
		*p = abs
	}
	return req, nil
}

func unmountCommand() *cli.Command {
	return &cli.Command{
		Name:      "umount",
		Aliases:   []string{"unmount"},
		Usage:     "unmount an image; its cache stays for the next time",
		ArgsUsage: "MOUNTPOINT",
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.Args().Len() != 1 {
				return errors.New("umount: want MOUNTPOINT")
			}
			point, err := filepath.Abs(c.Args().First())
			if err != nil {
				return fmt.Errorf("umount: %w", err)
			}
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			return client.Unmount(ctx, api.UnmountRequest{Mountpoint: point})
		},
	}
}

func removeCommand() *cli.Command {
	return &cli.Command{
		Name:        "remove",
		Aliases:     []string{"rm"},
		Usage:       "remove an image that is not mounted from the cache",
		ArgsUsage:   "IMAGE",
		Description: "IMAGE is the image's id as erofsctl status shows it, or what it was mounted from.\nBlobs that another image of its domain has stay.",
		Flags:       []cli.Flag{&cli.StringFlag{Name: "domain", Usage: "domain `NAME` that it was mounted in"}},
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.Args().Len() != 1 {
				return errors.New("remove: want IMAGE")
			}
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			return client.Remove(ctx, api.RemoveRequest{Image: c.Args().First(), DomainID: c.String("domain")})
		},
	}
}
