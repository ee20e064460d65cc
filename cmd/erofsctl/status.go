package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/api"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show every mounted image",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON, sizes in bytes"}},
		Action: func(ctx context.Context, c *cli.Command) error {
			client := api.NewClient(c.String("daemon"))
			defer client.Close()
			st, err := client.Status(ctx)
			if err != nil {
				return err
			}
			w := c.Root().Writer
			if c.Bool("json") {
				e := json.NewEncoder(w)
				e.SetIndent("", "  ")
				return e.Encode(st)
			}
			return printStatus(w, st, references(ctx, c.String("snapshotter")))
		},
	}
}

// snapshotterTime is how long status waits for a snapshotter: it can do without.
const snapshotterTime = 2 * time.Second

// references are those of containerd's images by their mount points. Without a snapshotter
// there are none.
func references(ctx context.Context, socket string) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, snapshotterTime)
	defer cancel()
	client := api.NewClient(socket)
	defer client.Close()
	list, err := client.Explain(ctx, "")
	if err != nil {
		return nil
	}
	found := map[string]string{}
	for _, e := range list {
		if e.Mountpoint != "" && e.Reference != "" {
			found[e.Mountpoint] = e.Reference
		}
	}
	return found
}

func printStatus(out io.Writer, st api.Status, references map[string]string) error {
	fmt.Fprintf(out, "erofsd %s, pid %d, transport %s, root %s\nkernel events %d, denied %d, in flight %d\n",
		st.Version, st.PID, st.Transport, st.Root, st.Kernel.Events, st.Kernel.Denied, st.Kernel.InFlight)
	fmt.Fprintf(out, "sandbox %s\n", sandboxed(st.Sandbox))
	fmt.Fprintf(out, "cache %s in %d images%s\n", size(st.CacheBytes), len(st.Kept), limit(st))
	if len(st.Images) == 0 {
		_, err := fmt.Fprintln(out, "no image is mounted")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nMOUNTPOINT\tPRESENT\tFETCHED\tREQUESTS\tEVENTS\tSTATE\tIMAGE")
	for _, m := range st.Images {
		fmt.Fprintf(w, "%s\t%s of %s\t%s\t%d\t%d\t%s\t%s\n", m.Mountpoint, size(m.BytesPresent), size(m.BytesTotal),
			size(m.BytesFetched), m.BackendRequests, m.KernelEvents, state(m), cmp.Or(references[m.Mountpoint], m.Source))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, m := range st.Images {
		for _, b := range m.Blobs {
			if b.LastError != "" {
				fmt.Fprintf(out, "%s: last read failed: %s\n", m.Mountpoint, b.LastError)
			}
		}
	}
	return nil
}

// sandboxed says what the daemon has given up, and what it could not.
func sandboxed(s api.Sandbox) string {
	text := s.Mode
	if len(s.Holds) > 0 {
		text += ": " + strings.Join(s.Holds, ", ")
	}
	for _, l := range s.Lacks {
		text += "; lacks " + l
	}
	return text
}

func limit(st api.Status) string {
	if st.CacheHigh == 0 {
		return ""
	}
	if st.CacheEvicted == 0 {
		return ", at most " + size(st.CacheHigh)
	}
	return ", at most " + size(st.CacheHigh) + ", took " + size(st.CacheEvicted) + " from images in use"
}

func state(m api.Mount) string {
	switch {
	case m.Detached:
		return "detached, in use"
	case m.Complete:
		return "complete"
	default:
		return "lazy"
	}
}

// size prints n bytes with a binary unit.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for ; f >= 1024; i++ {
		f /= 1024
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}
