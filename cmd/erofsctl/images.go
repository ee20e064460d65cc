package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/api"
)

// maxConfigFile bounds a configuration file, and maxList a list of files, in bytes.
const (
	maxConfigFile = 1 << 20
	maxList       = 1 << 20
)

func domainFlag() cli.Flag {
	return &cli.StringFlag{Name: "domain", Usage: "domain `NAME` of the image"}
}

// asking is the action of a command with one argument, called what, that asks the daemon.
func asking(what string, ask func(ctx context.Context, c *cli.Command, client *api.Client, arg string) error) cli.ActionFunc {
	return func(ctx context.Context, c *cli.Command) error {
		if c.Args().Len() != 1 {
			return fmt.Errorf("%s: want %s", c.Name, what)
		}
		client := api.NewClient(c.String("daemon"))
		defer client.Close()
		return ask(ctx, c, client, c.Args().First())
	}
}

func bindCommand() *cli.Command {
	return &cli.Command{
		Name:      "bind",
		Usage:     "make an image known by a name, so that it can be mounted by that",
		ArgsUsage: "ID",
		Description: "ID is a name of your choice: with cachefiles it is the fsid for mount(8), with either transport\n" +
			"the image of erofsctl mount --bound. Nothing is fetched. The same again brings what is new in the\n" +
			"configuration, which is a document of nydus's, version 1 or 2.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "bootstrap", Usage: "the image's bootstrap is `FILE`", Required: true},
			&cli.StringFlag{Name: "config", Usage: "where its data come from is in `FILE`", Required: true},
			&cli.BoolFlag{Name: "pin", Usage: "keep the image when the cache is full"},
			domainFlag(),
		},
		Action: asking("ID", func(ctx context.Context, c *cli.Command, client *api.Client, id string) error {
			boot, err := filepath.Abs(c.String("bootstrap"))
			if err != nil {
				return fmt.Errorf("bind: %w", err)
			}
			config, err := readConfig(c.String("config"))
			if err != nil {
				return fmt.Errorf("bind: %w", err)
			}
			return client.BindImage(ctx, api.BindRequest{
				ID: id, DomainID: c.String("domain"), Bootstrap: boot, Config: config, Pinned: c.Bool("pin"),
			})
		}),
	}
}

// readConfig reads a configuration file for the API, which takes JSON: a document that is
// none goes as a string.
func readConfig(name string) (json.RawMessage, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(p) > maxConfigFile {
		return nil, fmt.Errorf("read %s: it has more than %d bytes", name, maxConfigFile)
	}
	if json.Valid(p) {
		return p, nil
	}
	return json.Marshal(string(p))
}

func unbindCommand() *cli.Command {
	return &cli.Command{
		Name:      "unbind",
		Usage:     "forget a bound image; if it is mounted it can be read on",
		ArgsUsage: "ID",
		Flags:     []cli.Flag{domainFlag()},
		Action: asking("ID", func(ctx context.Context, c *cli.Command, client *api.Client, id string) error {
			return client.UnbindImage(ctx, api.ImageRequest{Image: id, DomainID: c.String("domain")})
		}),
	}
}

func prefetchCommand() *cli.Command {
	return &cli.Command{
		Name:      "prefetch",
		Usage:     "fetch files of a mounted image in the background, before they are read",
		ArgsUsage: "ID [FILE...]",
		Description: "ID is the image's id as erofsctl status shows it. A FILE is a path in the image, a directory with\n" +
			"all below; / is everything. Without any they are read from standard input, a line each.",
		Flags: []cli.Flag{domainFlag()},
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.Args().Len() == 0 {
				return errors.New("prefetch: want ID [FILE...]")
			}
			files := c.Args().Tail()
			if len(files) == 0 {
				var err error
				if files, err = readList(c.Root().Reader); err != nil {
					return fmt.Errorf("prefetch: %w", err)
				}
			}
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			return client.Prefetch(ctx, api.PrefetchRequest{Image: c.Args().First(), DomainID: c.String("domain"), Files: files})
		},
	}
}

// readList reads a list of files, without empty lines.
func readList(r io.Reader) (files []string, err error) {
	lines := bufio.NewScanner(io.LimitReader(r, maxList))
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" {
			files = append(files, line)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read list of files: %w", err)
	}
	return files, nil
}

func pinCommand() *cli.Command {
	return &cli.Command{
		Name:      "pin",
		Usage:     "keep an image when the cache is full, or with --off not any more",
		ArgsUsage: "ID",
		Flags:     []cli.Flag{domainFlag(), &cli.BoolFlag{Name: "off", Usage: "do not keep it any more"}},
		Action: asking("ID", func(ctx context.Context, c *cli.Command, client *api.Client, id string) error {
			return client.Pin(ctx, api.PinRequest{Image: id, DomainID: c.String("domain"), Pinned: !c.Bool("off")})
		}),
	}
}

func usageCommand() *cli.Command {
	return &cli.Command{
		Name:      "usage",
		Usage:     "show what an image takes of the disk",
		ArgsUsage: "ID",
		Flags:     []cli.Flag{domainFlag()},
		Action: asking("ID", func(ctx context.Context, c *cli.Command, client *api.Client, id string) error {
			u, err := client.Usage(ctx, api.ImageRequest{Image: id, DomainID: c.String("domain")})
			if err != nil {
				return err
			}
			w := c.Root().Writer
			fmt.Fprintf(w, "%s on disk", size(u.Disk))
			if u.Total > 0 {
				fmt.Fprintf(w, ", %s of %s present", size(u.Present), size(u.Total))
			}
			fmt.Fprintln(w)
			for _, b := range u.Blobs {
				fmt.Fprintf(w, "  blob %s  %s\n", b.ID, size(b.Disk))
			}
			return nil
		}),
	}
}

func evictCommand() *cli.Command {
	return &cli.Command{
		Name:        "evict",
		Usage:       "remove images that are not in use, the least recently used first",
		Description: "Images that are mounted, bound or pinned stay.",
		Flags:       []cli.Flag{&cli.Int64Flag{Name: "to", Usage: "until the cache takes no more than `BYTES`"}},
		Action: func(ctx context.Context, c *cli.Command) error {
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			cache, err := client.Evict(ctx, api.EvictRequest{Target: c.Int64("to")})
			if err != nil {
				return err
			}
			fmt.Fprintf(c.Root().Writer, "%d images are left, %s\n", cache.Images, size(cache.Bytes))
			return nil
		},
	}
}
