// Command demo shows a lazy image at work: it makes a Debian root file system,
// converts it, pushes it into a registry on loopback, mounts it by erofsd with nothing
// local, and runs a Python program in it. It leaves nothing behind but its cache.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/erofsd/erofsd/kernel-tests/debian"
	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/kernel-tests/link"
	"github.com/erofsd/erofsd/kernel-tests/rootfs"
)

func main() {
	harness.Init()
	bin := flag.String("bin", "bin", "`directory` of erofsd and erofsctl")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := run(ctx, *bin)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "\ndemo: interrupted; everything is cleaned up")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func step(line string) { fmt.Println("-", line) }

func run(ctx context.Context, bin string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root: run it as root (sudo make demo)")
	}
	if err := debian.Ensure(ctx, step, debian.Mmdebstrap, debian.Tar); err != nil {
		return err
	}
	base, err := rootfs.Build(ctx, step)
	if err != nil {
		return err
	}
	registry, image, err := harness.Publish(ctx, bin, base.Tar, step)
	if err != nil {
		return err
	}
	defer closing(registry, &err)

	var results []result
	for _, l := range []lane{{"loopback", link.Profile{}}, {"100 Mbit/s, 20 ms", link.Slow}} {
		r, err := l.run(ctx, bin, registry, image)
		if err != nil {
			return err
		}
		results = append(results, r)
	}
	print(os.Stdout, results)
	return nil
}

func closing(c io.Closer, err *error) { *err = errors.Join(*err, c.Close()) }

// print shows the results of all lanes side by side.
func print(out io.Writer, results []result) {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	row := func(name string, value func(r result) string) {
		cells := []string{name}
		for _, r := range results {
			cells = append(cells, value(r))
		}
		fmt.Fprintln(w, "  "+strings.Join(cells, "\t"))
	}
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	fmt.Fprintln(w)
	row("", func(r result) string { return r.lane.name })
	row("nothing local to mounted", func(r result) string { return seconds(r.mounted) })
	row("nothing local to first line", func(r result) string { return seconds(r.firstLine) })
	row("  fetched by then", func(r result) string {
		return fmt.Sprintf("%.1f of %.1f MB", mb(r.fetched), mb(r.size))
	})
	row("  requests by then", func(r result) string { return fmt.Sprint(r.requests) })
	row("full download, same image", func(r result) string { return seconds(r.download) })
	w.Flush()
	fmt.Fprintln(out, `
  Local at the start: erofsd, running, with an empty cache. The first line comes after
  "import numpy"; what was fetched includes metadata and what erofsd brings in the background.
  The full download is a plain transfer of the same blobs through the same link from the same
  registry, to nowhere: an eager start would still have to unpack them before it could begin.`)
}

func mb(n int64) float64 { return float64(n) / 1e6 }
