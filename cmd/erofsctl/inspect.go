package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/chunk"
)

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "show the metadata of an image, or of one path in it",
		ArgsUsage: "BOOTSTRAP [PATH]",
		Description: "Without PATH: superblock, devices, blobs and chunks. With PATH, from the image's\n" +
			"root: the attributes of the file and where its data lie. Symbolic links are not followed.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "bootstrap", Usage: "the image's bootstrap `FILE`, instead of the first argument"},
		},
		Action: func(_ context.Context, c *cli.Command) error {
			args := c.Args().Slice()
			if boot := c.String("bootstrap"); boot != "" {
				args = append([]string{boot}, args...)
			}
			if len(args) != 1 && len(args) != 2 {
				return errors.New("inspect: want BOOTSTRAP [PATH]")
			}
			if err := inspect(c.Root().Writer, args); err != nil {
				return fmt.Errorf("inspect %s: %w", args[0], err)
			}
			return nil
		},
	}
}

func inspect(out io.Writer, args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	m, err := erofs.Open(f, st.Size())
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	if len(args) == 2 {
		err = inspectPath(w, m, args[1])
	} else {
		err = inspectImage(w, m)
	}
	return errors.Join(err, w.Flush())
}

func inspectImage(w io.Writer, m *erofs.Image) error {
	s := m.Superblock()
	fmt.Fprintf(w, "size\t%d\n", m.Size())
	fmt.Fprintf(w, "block size\t%d\n", s.BlockSize())
	fmt.Fprintf(w, "features\tcompatible 0x%x, incompatible 0x%x\n", s.FeatureCompat, s.FeatureIncompat)
	fmt.Fprintf(w, "root\tnid %d\n", s.RootNID)
	fmt.Fprintf(w, "inodes\t%d\n", s.Inodes)
	fmt.Fprintf(w, "blocks\t%d\n", s.Blocks)
	fmt.Fprintf(w, "metadata\tfrom block %d\n", s.MetaBlkaddr)
	if id := hex.EncodeToString(s.UUID[:]); strings.Trim(id, "0") != "" {
		fmt.Fprintf(w, "uuid\t%s\n", id)
	}
	if name := string(bytes.TrimRight(s.VolumeName[:], "\x00")); name != "" {
		fmt.Fprintf(w, "volume name\t%q\n", name)
	}
	if x := m.RAFS(); x != nil {
		fmt.Fprintf(w, "RAFS v6\tflags 0x%x (%s)\n", x.Flags, rafsFlags(x.Flags))
		fmt.Fprintf(w, "chunk size\t%d\n", x.ChunkSize)
		fmt.Fprintf(w, "blob table\t%d bytes at %d\n", x.BlobTableLen, x.BlobTable)
		fmt.Fprintf(w, "prefetch table\t%d bytes at %d\n", x.PrefetchLen, x.Prefetch)
		fmt.Fprintf(w, "chunk table\t%d bytes at %d\n", x.ChunkTableLen, x.ChunkTable)
	} else {
		fmt.Fprint(w, "RAFS\tno, plain EROFS\n")
	}
	counts := map[uint32]int{}
	for c, err := range m.Chunks() {
		if err != nil {
			return err
		}
		counts[c.Blob]++
	}
	for i, d := range m.Devices() {
		fmt.Fprintf(w, "\ndevice %d\t%q\n", i+1, d.Tag)
		fmt.Fprintf(w, "  size\t%d (%d blocks, mapped at block %d)\n", int64(d.Blocks)<<s.BlockBits, d.Blocks, d.MappedBlkaddr)
		if m.RAFS() != nil {
			inspectBlob(w, m.BlobEntries()[i], counts[uint32(i)])
		}
	}
	return nil
}

func inspectBlob(w io.Writer, raw []byte, used int) {
	e, err := chunk.ParseEntry(raw)
	if err != nil {
		fmt.Fprintf(w, "  blob\t%v\n", err)
		return
	}
	fmt.Fprintf(w, "  blob\t%s\n", e.ID)
	fmt.Fprintf(w, "  chunks\t%d of at most %d bytes, %d of them in the image's chunk table\n", e.ChunkCount, e.ChunkSize, used)
	fmt.Fprintf(w, "  stored\t%d bytes, %v, digests %v\n", e.DataEnd(), e.Codec, e.Digester)
	fmt.Fprintf(w, "  features\t0x%x\n", uint32(e.Features))
	fmt.Fprintf(w, "  blob metadata\t%d bytes (%d stored, %v) at %d\n", e.MetaLen, e.MetaCLen, e.MetaCodec, e.MetaOff)
	if e.Features&chunk.FeatureSeparate != 0 {
		fmt.Fprintf(w, "  metadata blob\t%v, %d bytes\n", e.MetaBlobDigest, e.MetaBlobSize)
	}
}

// rafsFlags names the flags of the extended superblock (rafs-v6-format 1.3).
func rafsFlags(flags uint64) string {
	var names []string
	for _, f := range []struct {
		bit  uint64
		name string
	}{
		{0x1, "none"},
		{0x2, "lz4_block"},
		{0x40, "gzip"},
		{0x80, "zstd"},
		{0x4, "blake3"},
		{0x8, "sha256"},
		{0x10, "explicit ids"},
		{0x20, "xattrs"},
		{0x100, "inlined digests"},
		{0x200, "tarfs"},
		{0x1000000, "not encrypted"},
		{0x2000000, "encrypted"},
	} {
		if flags&f.bit != 0 {
			names = append(names, f.name)
		}
	}
	return strings.Join(names, ", ")
}

func inspectPath(w io.Writer, m *erofs.Image, path string) error {
	n, err := m.Lookup(path)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "path\t%q\n", path)
	fmt.Fprintf(w, "inode\tnid %d, number %d, %v\n", n.NID, n.Ino, n.Layout)
	fmt.Fprintf(w, "mode\t%06o\n", n.Mode)
	fmt.Fprintf(w, "owner\t%d:%d\n", n.UID, n.GID)
	fmt.Fprintf(w, "links\t%d\n", n.Nlink)
	fmt.Fprintf(w, "size\t%d\n", n.Size)
	fmt.Fprintf(w, "modified\t%s\n", time.Unix(n.Sec, int64(n.Nsec)).UTC().Format(time.RFC3339Nano))
	list, err := m.Xattrs(n)
	if err != nil {
		return err
	}
	for _, x := range list {
		fmt.Fprintf(w, "attribute\t%q = %q\n", x.Name, x.Value)
	}
	switch {
	case n.IsRegular():
		return inspectExtents(w, m, n)
	case n.IsDir():
		return inspectDir(w, m, n)
	case n.Mode&0o170000 == 0o120000:
		target, err := m.Readlink(n)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "target\t%q\n", target)
	case n.Major != 0 || n.Minor != 0:
		fmt.Fprintf(w, "device\t%d:%d\n", n.Major, n.Minor)
	}
	return nil
}

func inspectExtents(w io.Writer, m *erofs.Image, n erofs.Inode) error {
	header := "\nOFFSET\tLENGTH\tDEVICE\tAT\tCHUNK\n"
	for e, err := range m.Extents(n) {
		if err != nil {
			return err
		}
		fmt.Fprint(w, header)
		header = ""
		device, at, number := fmt.Sprint(e.Device), fmt.Sprint(e.Off), "-"
		if e.Device == erofs.Hole {
			device, at = "hole", "-"
		} else if m.RAFS() != nil {
			number = fmt.Sprint(e.Chunk)
		}
		fmt.Fprintf(w, "%d\t%d\t%s\t%s\t%s\n", e.FileOff, e.Len, device, at, number)
	}
	return nil
}

func inspectDir(w io.Writer, m *erofs.Image, n erofs.Inode) error {
	fmt.Fprint(w, "\nNID\tTYPE\tNAME\n")
	for e, err := range m.ReadDir(n) {
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%d\t%d\t%q\n", e.NID, e.Type, e.Name)
	}
	return nil
}
