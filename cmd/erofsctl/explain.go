package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/api"
)

func explainCommand() *cli.Command {
	return &cli.Command{
		Name:      "explain",
		Usage:     "say why images of containerd are served lazily, or not",
		ArgsUsage: "[IMAGE]",
		Description: "IMAGE is the reference that the image was pulled by, as containerd has it; without it all images are\n" +
			"told. The snapshotter is asked, at the socket of its system API (system.address).",
		Flags:  []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON, with the labels that decided"}},
		Action: explain,
	}
}

func explain(ctx context.Context, c *cli.Command) error {
	if c.Args().Len() > 1 {
		return fmt.Errorf("%s: want one image", c.Name)
	}
	client := api.NewClient(c.String("snapshotter"))
	defer client.Close()
	list, err := client.Explain(ctx, c.Args().First())
	if refusal := (*api.Error)(nil); errors.As(err, &refusal) {
		return err
	}
	if err != nil {
		return fmt.Errorf("ask the snapshotter: %w; is its system.address that of --snapshotter?", err)
	}
	w := c.Root().Writer
	if c.Bool("json") {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(list)
	}
	if len(list) == 0 && c.Args().Len() == 1 {
		return fmt.Errorf("the snapshotter has no image %s: write its whole reference, as containerd lists it, and see that it was pulled with this snapshotter", c.Args().First())
	}
	return printExplanations(w, list)
}

func printExplanations(w io.Writer, list []api.Explanation) error {
	var errs []error
	say := func(format string, args ...any) {
		_, err := fmt.Fprintf(w, format, args...)
		errs = append(errs, err)
	}
	for n, e := range list {
		if n > 0 {
			say("\n")
		}
		say("%s\n  %s: %s\n", imageName(e), lazily(e), e.Why)
		if e.Mountpoint != "" {
			say("  mount point %s\n", e.Mountpoint)
		}
		for _, l := range e.Layers {
			say("  snapshot %s %s: %s\n", l.Snapshot, l.Decision, l.Why)
			for _, name := range slices.Sorted(maps.Keys(l.Labels)) {
				say("    %s = %q\n", name, l.Labels[name])
			}
		}
	}
	return errors.Join(errs...)
}

// imageName is what people call an image, or the name of its snapshot.
func imageName(e api.Explanation) string {
	if e.Reference == "" {
		return e.Name
	}
	return e.Reference
}

func lazily(e api.Explanation) string {
	if e.Lazy {
		return "served lazily (" + e.State + ")"
	}
	return "not served lazily"
}
