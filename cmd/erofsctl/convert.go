package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/convert"
)

func convertCommand() *cli.Command {
	return &cli.Command{
		Name:      "convert",
		Usage:     "make a lazy image out of a root file system",
		ArgsUsage: "SRC DEST",
		Description: `SRC is a directory, a tar, tar.gz or tar.zst file, or an OCI layout directory
(its image for this machine's architecture, all layers in one).

DEST is a directory, which gets image.boot and blobs/<sha256>, or a registry
reference host/repo:tag, which gets a nydus image. It is a reference when it
looks like one (a slash, and a colon behind the last slash), does not begin
with "/" or "." and is no directory that exists; else it is a directory.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "chunk-size", Value: "256KiB", Usage: "largest unit of compression and fetching, a power of two from 4KiB to 16MiB"},
			&cli.StringFlag{Name: "compressor", Value: "zstd", Usage: "zstd, lz4_block or none"},
			&cli.StringFlag{Name: "digester", Value: "blake3", Usage: "blake3 or sha256"},
			&cli.BoolFlag{Name: "plain-http", Usage: "speak HTTP without TLS to the registry"},
			&cli.StringFlag{Name: "ca-file", Usage: "trust the certificates in `FILE` (PEM) for the registry"},
		},
		Action: runConvert,
	}
}

func runConvert(ctx context.Context, c *cli.Command) error {
	if c.NArg() != 2 {
		return errors.New("convert takes two arguments: SRC and DEST")
	}
	src, dest := c.Args().Get(0), c.Args().Get(1)
	chunk, err := parseSize(c.String("chunk-size"))
	if err != nil {
		return fmt.Errorf("--chunk-size: %w", err)
	}
	p := newProgress(c.Root().ErrWriter)
	o := convert.Options{
		ChunkSize: chunk, Compressor: c.String("compressor"), Digester: c.String("digester"), Progress: p.event,
	}
	start := time.Now()
	var r *convert.Result
	if isReference(dest) {
		r, err = convertToRegistry(ctx, c, src, dest, o)
	} else {
		r, err = convert.ConvertToDir(ctx, src, dest, o)
	}
	p.done()
	if err != nil {
		if ctx.Err() != nil {
			return errors.New("interrupted: nothing was left behind")
		}
		return err
	}
	fmt.Fprintln(c.Root().Writer, summary(r, time.Since(start)))
	return nil
}

func convertToRegistry(ctx context.Context, c *cli.Command, src, dest string, o convert.Options) (*convert.Result, error) {
	store, err := registry.New(registry.Options{
		PlainHTTP: c.Bool("plain-http"), HTTP: backend.HTTPOptions{CAFiles: []string{c.String("ca-file")}}, Credential: registry.DockerCredentials(),
	})
	if err != nil {
		return nil, err
	}
	defer store.Close()
	pusher, err := store.Pusher(dest)
	if err != nil {
		return nil, err
	}
	return convert.Convert(ctx, src, pusher, o)
}

// isReference decides what DEST is, as the help says.
func isReference(dest string) bool {
	if strings.HasPrefix(dest, "/") || strings.HasPrefix(dest, ".") {
		return false
	}
	slash := strings.LastIndexByte(dest, '/')
	if slash <= 0 || !strings.ContainsRune(dest[slash:], ':') {
		return false
	}
	st, err := os.Stat(dest)
	return err != nil || !st.IsDir()
}

// parseSize reads a number of bytes with an optional unit: 64KiB, 1MiB, 4096.
func parseSize(s string) (uint32, error) {
	number, shift := s, 0
	for unit, n := range map[string]int{"KiB": 10, "MiB": 20, "K": 10, "M": 20, "k": 10, "m": 20} {
		if rest, ok := strings.CutSuffix(s, unit); ok {
			number, shift = rest, n
		}
	}
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil || n<<shift>>shift != n || n<<shift > 1<<31 {
		return 0, fmt.Errorf("%q is not a size: write it like 256KiB or 1MiB", s)
	}
	return uint32(n << shift), nil
}

func summary(r *convert.Result, took time.Duration) string {
	ratio := 0.0
	if r.Out > 0 {
		ratio = float64(r.In) / float64(r.Out)
	}
	s := fmt.Sprintf("%s in, %s out, ratio %.2f, %d files, %d chunks, %.1f s", size(r.In), size(r.Out), ratio, r.Files, r.Chunks, took.Seconds())
	if r.Digest != "" {
		s += ", " + r.Digest.String()
	}
	return s
}

// A progress draws one line that is drawn over if w is a terminal, and otherwise
// writes one plain line for each layer that is finished.
type progress struct {
	w        io.Writer
	terminal bool
	drawn    time.Time
	width    int // of the line that is on the screen
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w}
	if f, ok := w.(*os.File); ok {
		st, err := f.Stat()
		p.terminal = err == nil && st.Mode()&os.ModeCharDevice != 0 && filepath.Base(f.Name()) != "null"
	}
	return p
}

func (p *progress) event(e convert.Event) {
	line := fmt.Sprintf("%s %d/%d %s %s", e.Stage, e.Layer, e.Layers, e.Name, size(e.Done))
	if !p.terminal {
		if e.End {
			fmt.Fprintln(p.w, line)
		}
		return
	}
	if now := time.Now(); now.Sub(p.drawn) >= 100*time.Millisecond || e.End {
		p.drawn = now
		if e.Total > 0 && e.Done <= e.Total {
			const cells = 20
			full := int(e.Done * cells / e.Total)
			line += fmt.Sprintf(" of %s [%s%s]", size(e.Total), strings.Repeat("#", full), strings.Repeat(".", cells-full))
		}
		fmt.Fprintf(p.w, "\r%-*s", p.width, line)
		p.width = len(line)
	}
}

// done leaves the cursor at the beginning of an empty line.
func (p *progress) done() {
	if p.terminal && p.width > 0 {
		fmt.Fprintf(p.w, "\r%*s\r", p.width, "")
		p.width = 0
	}
}
