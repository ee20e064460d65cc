package erofs

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Limits bound what [Check] accepts and what it may use. The zero value is right
// for container images.
type Limits struct {
	Size    int64 // of a RAFS bootstrap, bytes; 0: 2 GiB
	Entries int64 // names in all directories together; 0: 16 Mi
	Memory  int64 // bytes to remember what was seen, beside 32 MiB of the image at most; 0: 64 MiB
	Defects int   // list up to that many defects and go on behind each; 0: the first one is Check's error
}

func (l Limits) withDefaults() Limits {
	if l.Size == 0 {
		l.Size = maxBootstrap
	}
	if l.Entries == 0 {
		l.Entries = 16 << 20
	}
	if l.Memory == 0 {
		l.Memory = 64 << 20
	}
	return l
}

// A Summary says what [Check] has seen.
type Summary struct {
	RAFS     bool
	Flags    uint64 // RAFS: of the extended superblock
	Compat   uint32
	Incompat uint32
	Blobs    []string // tags of the devices
	Inodes   int64
	Entries  int64 // names, without "." and ".."
	Chunks   int64 // extents of all files
	Size     int64 // bytes of all files, each hard-linked file once; holes included
	Defects  []string
	Full     bool // Check stopped when Defects had its full length
}

// errEnough ends a check whose list of defects is full.
var errEnough = errors.New("enough defects")

// Check is the admission test that every image passes before the kernel may
// mount it: it follows everything that the kernel would follow and refuses what
// is out of range, overlaps, has a cycle, or is of a kind that is not needed
// here (design 1.6; the reasons are in performance.md 7). For RAFS it also
// compares each file's chunks with the chunk table, so that what the kernel
// reads is what the digests are for. It reads the metadata only, in time
// proportional to their size, and needs no more memory than l allows.
//
// The error is a [*FormatError] or [errors.ErrUnsupported] for a defect, and
// says at which path; else it is ctx's or r's. With l.Defects the defects are in
// the summary and the error is for the rest. The summary is never nil.
func Check(ctx context.Context, r io.ReaderAt, size int64, l Limits) (*Summary, error) {
	c := &checker{l: l.withDefaults(), links: map[uint64]uint32{}, shared: map[uint32]struct{}{}}
	err := c.image(ctx, r, size)
	if errors.Is(err, errEnough) {
		c.sum.Full, err = true, nil
	}
	if err != nil {
		err = fmt.Errorf("check image: %w", err)
	}
	return &c.sum, err
}

// A checker holds what a check has to remember. No part of it grows with file
// data, and used tells how large it has become.
type checker struct {
	m   *Image
	l   Limits
	sum Summary

	claimed slots             // by inodes with what follows them, directory blocks and tables
	inodes  slots             // the starts of those seen
	links   map[uint64]uint32 // nid of a file with several names: those still to come
	shared  map[uint32]struct{}
	chunks  []tableChunk // the chunk table, sorted
	next    int          // where the next chunk is probably found
	used    int64        // bytes of links, shared and chunks
	path    []byte
}

func (c *checker) image(ctx context.Context, r io.ReaderAt, size int64) error {
	m, err := Open(r, size)
	if err != nil {
		return c.report(err)
	}
	c.m = m
	c.sum.Compat, c.sum.Incompat = m.sb.FeatureCompat, m.sb.FeatureIncompat
	for _, d := range m.devices {
		c.sum.Blobs = append(c.sum.Blobs, d.Tag)
	}
	if m.rafs != nil {
		c.sum.RAFS, c.sum.Flags = true, m.rafs.Flags
	}
	if err := c.tables(); err != nil {
		return err
	}
	if m.rafs != nil {
		if err := c.chunkTable(ctx); err != nil {
			return err
		}
	}
	if err := c.root(ctx); err != nil {
		return err
	}
	return c.report(ctx.Err())
}

// report decides what becomes of err: a defect is listed when the caller wants a
// list, and the check goes on; everything else ends it.
func (c *checker) report(err error) error {
	f := (*FormatError)(nil)
	if err == nil || c.l.Defects == 0 || !errors.As(err, &f) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	c.sum.Defects = append(c.sum.Defects, err.Error())
	if len(c.sum.Defects) == c.l.Defects {
		return errEnough
	}
	return nil
}

// at reports err for the path that is being checked.
func (c *checker) at(err error) error {
	if err == nil {
		return nil
	}
	return c.report(fmt.Errorf("%s: %w", abbreviate(string(c.path)), err))
}

func (c *checker) root(ctx context.Context) error {
	n, err := c.m.Inode(c.m.Root())
	if err != nil {
		return c.at(err)
	}
	if !n.IsDir() {
		return c.at(bad("mode %o is no directory", n.Mode))
	}
	return c.inode(ctx, n, n.NID, 0)
}

// dir checks the entries of directory n and what they lead to.
func (c *checker) dir(ctx context.Context, n Inode, parent uint64, depth int) error {
	if depth > maxDepth {
		return c.at(bad("more than %d directories deep", maxDepth))
	}
	var previous string
	dots := 0
	for e, err := range c.m.ReadDir(n) {
		if err != nil {
			return c.at(err) // what follows cannot be found
		}
		if e.Name <= previous {
			if err := c.at(bad("directory: %.80q follows %.80q, which is not their order", e.Name, previous)); err != nil {
				return err
			}
		}
		previous = e.Name
		if e.Name == "." || e.Name == ".." {
			dots++
			want := n.NID
			if e.Name == ".." {
				want = parent
			}
			if e.NID != want || e.Type != fileTypes[typeDir>>12] {
				err = c.at(bad("directory: %q is inode %d of type %d instead of %d", e.Name, e.NID, e.Type, want))
			}
		} else {
			err = c.entry(ctx, e, n, depth)
		}
		if err != nil {
			return err
		}
	}
	if dots != 2 {
		return c.at(bad("directory: lacks \".\" or \"..\""))
	}
	return nil
}

// entry checks a name of directory dir and, when it is the first one that leads
// there, its inode.
func (c *checker) entry(ctx context.Context, e Dirent, dir Inode, depth int) error {
	if c.sum.Entries++; c.sum.Entries > c.l.Entries {
		return bad("more than %d names", c.l.Entries)
	}
	if c.sum.Entries%256 == 0 && ctx.Err() != nil {
		return ctx.Err()
	}
	before := len(c.path)
	if before > 0 {
		c.path = append(c.path, '/')
	}
	c.path = append(c.path, e.Name...)
	defer func() { c.path = c.path[:before] }()

	n, err := c.m.Inode(e.NID)
	if err != nil {
		return c.at(err)
	}
	if e.Type != fileTypes[n.Mode>>12] {
		if err := c.at(bad("entry of type %d, inode of mode %o", e.Type, n.Mode)); err != nil {
			return err
		}
	}
	if !c.inodes.has(n.off / slotSize) {
		return c.inode(ctx, n, dir.NID, depth+1)
	}
	if n.IsDir() {
		return c.at(bad("directory %d is reached twice", n.NID))
	}
	if c.links[n.NID] == 0 {
		return c.at(bad("inode %d has more names than its link count %d", n.NID, n.Nlink))
	}
	c.links[n.NID]--
	return nil
}

// inode checks an inode that is seen for the first time, and what is below it.
func (c *checker) inode(ctx context.Context, n Inode, parent uint64, depth int) error {
	c.sum.Inodes++
	start := n.off / slotSize
	if err := c.grow(c.inodes.add(start, start+1)); err != nil {
		return err
	}
	if n.Nlink == 0 {
		if err := c.at(bad("link count 0")); err != nil {
			return err
		}
	}
	if n.Nlink > 1 && !n.IsDir() {
		c.links[n.NID] = n.Nlink - 1
		if err := c.grow(48); err != nil {
			return err
		}
	}
	if n.Nsec >= 1e9 {
		if err := c.at(bad("time with %d ns", n.Nsec)); err != nil {
			return err
		}
	}
	if err := c.xattrs(n); err != nil {
		return err
	}
	switch n.Mode & typeMask {
	case typeDir:
		if err := c.claimFlat(n); err != nil {
			return c.at(err)
		}
		return c.dir(ctx, n, parent, depth)
	case typeLnk:
		if _, err := c.m.Readlink(n); err != nil {
			return c.at(err)
		}
		return c.at(c.claimFlat(n))
	case typeReg:
		return c.file(ctx, n)
	}
	return c.at(c.claim(n.off, n.tail()-n.off))
}

// xattrs checks the attributes of n; shared ones once, whoever has them.
func (c *checker) xattrs(n Inode) error {
	shared, inline, err := c.m.xattrArea(n)
	if err != nil {
		return c.at(err)
	}
	for _, id := range shared {
		if _, ok := c.shared[id]; ok {
			continue
		}
		c.shared[id] = struct{}{}
		if err := c.grow(16); err != nil {
			return err
		}
		if _, err := c.m.sharedXattr(id); err != nil {
			if err := c.at(fmt.Errorf("shared attribute %d: %w", id, err)); err != nil {
				return err
			}
		}
	}
	for len(inline) > 0 {
		_, size, err := parseXattr(inline)
		if err != nil {
			return c.at(fmt.Errorf("attributes: %w", err))
		}
		inline = inline[size:]
	}
	return nil
}

// claimFlat claims an inode with flat data for itself: the inode, what is inline
// behind it and whole blocks.
func (c *checker) claimFlat(n Inode) error {
	at, end, err := c.m.flat(n)
	if err != nil {
		return err
	}
	if err := c.claim(n.off, n.tail()+n.Size-end-n.off); err != nil || end == 0 {
		return err
	}
	blocks := align(end, c.m.sb.BlockSize())
	if err := c.claim(at, blocks); err != nil || end == blocks || !n.IsDir() {
		return err
	}
	// The kernel looks for the end of the last name beyond the directory's size
	// when it looks a name up (find_target_dirent, fs/erofs/namei.c, 6.18).
	p, err := c.m.pages.read(at+end, 1)
	if err == nil && p[0] != 0 {
		err = bad("directory: byte 0x%02x behind the last name", p[0])
	}
	return err
}

// claim notes that [off, off+n) of the image has a use, and refuses a second one.
func (c *checker) claim(off, n int64) error {
	if off < 0 || off > c.m.pages.size || n > c.m.pages.size-off {
		return bad("bytes [%d, +%d) are outside of the image of %d bytes", off, n, c.m.pages.size)
	}
	if n == 0 {
		return nil
	}
	first, end := off/slotSize, (off+n-1)/slotSize+1
	if at, ok := c.claimed.first(first, end); ok {
		return bad("bytes [%d, +%d) overlap what is at %d", off, n, at*slotSize)
	}
	return c.grow(c.claimed.add(first, end))
}

// grow accounts for n bytes of memory.
func (c *checker) grow(n int64) error {
	if c.used += n; c.used > c.l.Memory {
		return fmt.Errorf("the check needs more than its %d bytes of memory", c.l.Memory)
	}
	return nil
}
