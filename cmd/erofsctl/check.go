package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/chunk"
)

// maxDefects bounds what check lists of the metadata, and of each blob.
const maxDefects = 100

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:  "check",
		Usage: "verify an image's metadata and, with its blobs, every chunk",
		Description: "Prints one line for each defect and one in the end. The exit code is 1 when there\n" +
			"are defects. The metadata pass the same test before every mount.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "bootstrap", Required: true, Usage: "check the image whose bootstrap is `FILE`"},
			&cli.StringFlag{Name: "blob-dir", Usage: "decode and verify every chunk of its blobs in `DIR`"},
		},
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.NArg() > 0 {
				return fmt.Errorf("check: unexpected argument %q", c.Args().First())
			}
			k := &check{out: c.Root().Writer}
			if err := k.image(ctx, c.String("bootstrap"), c.String("blob-dir")); err != nil {
				return fmt.Errorf("check: %w", err)
			}
			if k.defects > 0 {
				return cli.Exit("", 1)
			}
			return nil
		},
	}
}

// A check counts what it has seen and prints defects as it finds them.
type check struct {
	out     io.Writer
	defects int
	chunks  int   // verified
	bytes   int64 // of them, plain
	skipped int   // chunks that nothing has a digest for
}

func (k *check) defect(format string, a ...any) {
	k.defects++
	fmt.Fprintf(k.out, format+"\n", a...)
}

func (k *check) image(ctx context.Context, boot, blobDir string) error {
	f, err := os.Open(boot)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	sum, err := erofs.Check(ctx, f, st.Size(), erofs.Limits{Defects: maxDefects})
	if err != nil {
		return err
	}
	for _, d := range sum.Defects {
		k.defect("metadata: %s", d)
	}
	if sum.Full {
		k.defect("metadata: not checked further after %d defects", maxDefects)
	}
	if blobDir != "" {
		if m, err := erofs.Open(f, st.Size()); err == nil { // the error is among the defects
			if err := k.blobs(ctx, m, blobDir); err != nil {
				return err
			}
		}
	}
	k.summary(boot, sum, blobDir != "")
	return nil
}

func (k *check) summary(boot string, sum *erofs.Summary, blobs bool) {
	fmt.Fprintf(k.out, "%s: %s; %d names, %d inodes, %s in %d chunks, %d blob(s)", boot, verdict(k.defects),
		sum.Entries, sum.Inodes, size(sum.Size), sum.Chunks, len(sum.Blobs))
	if blobs {
		fmt.Fprintf(k.out, "; %d stored chunks verified, %s", k.chunks, size(k.bytes))
	}
	if k.skipped > 0 {
		fmt.Fprintf(k.out, "; %d have no digest", k.skipped)
	}
	fmt.Fprintln(k.out)
}

func verdict(defects int) string {
	switch defects {
	case 0:
		return "ok"
	case 1:
		return "1 defect"
	}
	return fmt.Sprintf("%d defects", defects)
}

// blobs verifies the chunks of every blob of m. The error is ctx's; everything
// else that goes wrong is a defect of the blob.
func (k *check) blobs(ctx context.Context, m *erofs.Image, dir string) error {
	if m.RAFS() == nil {
		k.defect("blobs: plain EROFS has no digests to verify them with")
		return nil
	}
	digests := map[uint32][]erofs.ChunkInfo{}
	for c, err := range m.Chunks() {
		if err != nil {
			return err
		}
		digests[c.Blob] = append(digests[c.Blob], c)
	}
	for i, raw := range m.BlobEntries() {
		e, err := chunk.ParseEntry(raw)
		if err != nil {
			k.defect("%v", err)
			continue
		}
		if err := k.blob(ctx, e, digests[uint32(i)], dir); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			k.defect("blob %s: %v", e.ID, err)
		}
	}
	return nil
}

func (k *check) blob(ctx context.Context, e chunk.Entry, digests []erofs.ChunkInfo, dir string) error {
	data, err := openBlob(dir, e.ID)
	if err != nil {
		return err
	}
	defer data.Close()
	meta := data
	if e.Features&chunk.FeatureSeparate != 0 {
		if meta, err = openBlob(dir, e.MetaBlobDigest.String()); err != nil {
			return err
		}
		defer meta.Close()
	}
	t, err := chunk.ReadTable(ctx, meta, e)
	if err != nil {
		return err
	}
	for _, c := range digests {
		if _, err := t.SetDigest(int(c.Index), c.Off, c.Len, c.Digest); err != nil {
			return fmt.Errorf("chunk table of the bootstrap: %w", err)
		}
	}
	if err := addDigests(ctx, t, meta, e); err != nil {
		return err
	}
	return k.units(ctx, t, data, e)
}

// addDigests adds the digests that the blob itself keeps, for chunks that the
// image does not use. Many blobs have none.
func addDigests(ctx context.Context, t *chunk.Table, meta *blobFile, e chunk.Entry) error {
	list, err := chunk.ReadDigests(ctx, meta, e)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	for i, d := range list[:min(len(list), t.Len())] {
		c := t.Chunk(i)
		if _, err := t.SetDigest(i, c.Off, c.Len, d); err != nil {
			return fmt.Errorf("digests of the blob: %w", err)
		}
	}
	return nil
}

// units decodes every unit of t, on all processors, and reports those that are
// wrong in their order.
func (k *check) units(ctx context.Context, t *chunk.Table, data *blobFile, e chunk.Entry) error {
	var mu sync.Mutex // guards next and wrong
	next, wrong := 0, map[int]error{}
	g, ctx := errgroup.WithContext(ctx)
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error {
			d := chunk.NewDecoder()
			defer d.Close()
			var src, dst []byte
			for {
				mu.Lock()
				u := next
				next++
				full := len(wrong) >= maxDefects
				mu.Unlock()
				if u >= t.Units() || full {
					return nil
				}
				x := t.Unit(u)
				src, dst = slices.Grow(src[:0], int(x.CLen))[:x.CLen], slices.Grow(dst[:0], int(x.Len))[:x.Len]
				err := data.ReadAt(ctx, src, x.COff)
				if err == nil {
					err = d.Decode(t, u, dst, src)
				}
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil {
					mu.Lock()
					wrong[u] = err
					mu.Unlock()
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for u := range t.Units() {
		x := t.Unit(u)
		if err := wrong[u]; err != nil {
			k.defect("blob %s: chunks %d to %d, stored at [%d, +%d): %v", e.ID, x.First, x.Last-1, x.COff, x.CLen, err)
			continue
		}
		for i := x.First; i < x.Last; i++ {
			if c := t.Chunk(i); c.Known {
				k.chunks++
				k.bytes += c.Len
			} else {
				k.skipped++
			}
		}
	}
	if len(wrong) >= maxDefects {
		k.defect("blob %s: not checked further after %d defects", e.ID, len(wrong))
	}
	return nil
}

// A blobFile is a blob in a directory.
type blobFile struct {
	f    *os.File
	size int64
}

func openBlob(dir, id string) (*blobFile, error) {
	if !filepath.IsLocal(id) || filepath.Base(id) != id {
		return nil, fmt.Errorf("its id %q is no file name", id)
	}
	f, err := os.Open(filepath.Join(dir, id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("is not in %s", dir)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &blobFile{f, st.Size()}, nil
}

// ReadAt fills p from offset off; a file that is too short is an error.
func (b *blobFile) ReadAt(_ context.Context, p []byte, off int64) error {
	if n, err := b.f.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("read [%d, +%d) of %d bytes: %w", off, len(p), b.size, err)
	}
	return nil
}

func (b *blobFile) Size() int64  { return b.size }
func (b *blobFile) Close() error { return b.f.Close() }
