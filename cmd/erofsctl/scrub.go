package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/api"
)

func scrubCommand() *cli.Command {
	return &cli.Command{
		Name:      "scrub",
		Usage:     "verify what the cache has, and repair what is wrong",
		ArgsUsage: "[IMAGE...]",
		Description: "IMAGE is an id as erofsctl status shows it, or what the image was mounted from; without any it is\n" +
			"everything. Readers go on meanwhile. What is wrong is fetched again; of images that nobody has open,\n" +
			"when it is read. The exit code is 1 if something could not be repaired: then it is an error to read\n" +
			"it. What a container has read already stays in its memory until it is dropped there. Not with\n" +
			"cachefiles, whose cache only the kernel can read.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "rate", Value: "50MiB", Usage: "read at most so many `BYTES` in a second"},
			domainFlag(),
		},
		Action: func(ctx context.Context, c *cli.Command) error {
			rate, err := parseSize(c.String("rate"))
			if err == nil && rate == 0 {
				err = errors.New("want more than nothing")
			}
			if err != nil {
				return fmt.Errorf("scrub: rate: %w", err)
			}
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			s, err := client.Scrub(ctx, api.ScrubRequest{Images: c.Args().Slice(), DomainID: c.String("domain"), Rate: int64(rate)})
			if err != nil {
				return err
			}
			w := c.Root().Writer
			fmt.Fprintf(w, "%d blobs, %d chunks, %s verified: %d wrong, %d repaired, %d not repaired\n",
				s.Blobs, s.Chunks, size(s.Bytes), s.Wrong, s.Repaired, s.Unrepaired)
			for _, e := range s.Errors {
				fmt.Fprintf(w, "  %s\n", e)
			}
			if s.Unrepaired > 0 || len(s.Errors) > 0 {
				return errors.New("scrub: not everything could be verified or repaired; see above, and try again when the backend and the disk are well")
			}
			return nil
		},
	}
}
