package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/sandbox"
)

// A transport as doctor shows it: what it needs, and the probe of each need.
type transport struct {
	name   string
	probes []func(dir string) error
}

func transports() []transport {
	return []transport{
		{"fanotify", []func(string) error{fanotify.Supported, erofs.Supported}},
		{"cachefiles", []func(string) error{cachefilesSupported}},
	}
}

func cachefilesSupported(dir string) error { return cachefiles.Supported("", dir) }

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "say which transports this machine can do, what each of the others lacks, and what the daemon's sandbox is here",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Value: "/var/lib/erofsd", Usage: "`DIR` where the cache would be"},
		},
		Action: func(_ context.Context, c *cli.Command) error {
			w, usable := c.Root().Writer, false
			dir, remove, err := scratch(c.String("root"))
			if err != nil {
				return err
			}
			defer remove()
			for _, t := range transports() {
				if err := diagnose(t, dir); err != nil {
					fmt.Fprintf(w, "%-10s  no: %v\n", t.name, err)
					continue
				}
				usable = true
				fmt.Fprintf(w, "%-10s  yes\n", t.name)
			}
			if r := sandbox.Probe(); r.Complete() {
				fmt.Fprintf(w, "%-10s  yes: %v\n", "sandbox", r)
			} else {
				fmt.Fprintf(w, "%-10s  in part: %v\n", "sandbox", r)
			}
			if !usable {
				return cli.Exit("no transport works here", 1)
			}
			return nil
		},
	}
}

// diagnose returns the first thing that t lacks.
func diagnose(t transport, dir string) error {
	for _, probe := range t.probes {
		if err := probe(dir); err != nil {
			return err
		}
	}
	return nil
}

// scratch makes a directory for probes on the file system of root. While root
// does not exist that is where its parent lies: a diagnosis leaves nothing behind.
func scratch(root string) (dir string, remove func(), err error) {
	if root, err = filepath.Abs(root); err != nil {
		return "", nil, fmt.Errorf("doctor: %w", err)
	}
	for _, err := os.Stat(root); errors.Is(err, os.ErrNotExist); _, err = os.Stat(root) {
		root = filepath.Dir(root)
	}
	dir, err = os.MkdirTemp(root, "erofsd-doctor-*")
	if err != nil {
		return "", nil, fmt.Errorf("doctor: %w (choose another --root)", err)
	}
	return dir, func() { os.RemoveAll(dir) }, nil
}
