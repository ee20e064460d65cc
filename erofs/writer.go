package erofs

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// WriteOptions says how [Write] stores a tree.
type WriteOptions struct {
	// Blobs are the data blobs that the tree's chunks lie in. Those that no file
	// refers to are left out of the image, the others are numbered in order of
	// first use (breadth-first, names sorted bytewise). At most 254 may be used.
	Blobs []Blob

	// ChunkSize is the size of all chunks but a file's last, in bytes: a power
	// of two from 4096 to 16 MiB, the same in every blob entry.
	ChunkSize uint32

	// Codec and Digester are the image's defaults in the numbers of the blob
	// table (rafs-v6-format 1.5): 0 none, 1 lz4_block, 2 gzip, 3 zstd; 0 BLAKE3,
	// 1 SHA-256. Each blob's own are in its entry; an image may mix them.
	Codec, Digester uint32

	// SharedXattrs stores an attribute that several inodes have only once. The
	// kernel reads such images; nydusd refuses shared attributes in the
	// superblock and does not see them without, so they are off by default.
	SharedXattrs bool
}

// Write writes the tree below root to w as a RAFS v6 bootstrap: an EROFS image
// without file data that the kernel mounts with one device per blob and that
// nydusd accepts (rafs-v6-format sections 1, 2 and 9.2). Equal trees and options
// give equal bytes. w gets them in order; besides the tree itself Write holds
// about 150 bytes an inode.
//
// The whole tree is checked before the first byte is written. An error names
// the path that cannot be stored: among others a directory reached twice, a name
// with a slash, a chunk list that does not match the size, an attribute with an
// unknown prefix. The tree must not change during the call; Write does not
// change it, so that concurrent calls may share it.
func Write(w io.Writer, root *Node, o WriteOptions) error {
	b := &writer{o: o}
	if err := b.plan(root); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	out := &output{w: bufio.NewWriterSize(w, 256<<10)}
	if err := b.emit(out); err != nil {
		return fmt.Errorf("write bootstrap: at byte %d: %w", out.at, err)
	}
	return nil
}

// A writer holds what is known of the image while it is made: plan finds the
// place of everything, then emit writes it from front to back.
type writer struct {
	o       WriteOptions
	inodes  []winode // breadth-first, so that a directory's children are neighbours; 0 is the root
	dirents []dirent // of all directories, grouped
	shared  sharedXattrs
	xattrs  bool // some inode has one

	blobs    []usedBlob // in the order of the device table
	blobSlot []int      // position in o.Blobs -> position in blobs + 1; 0 is unused
	chunks   []ChunkRef // the chunk table, sorted; positions in o.Blobs

	l     layout
	order []piece // what lies in the metadata area, by offset
}

// A winode is a node with its place in the image.
type winode struct {
	n        *Node
	at       int64  // of the inode, bytes from the start of the image
	body     int64  // of the blocks that are not inline
	size     int64  // i_size
	first    int    // directories: writer.dirents[first:first+count]
	count    int    //
	nlink    uint32 //
	parent   uint32 // of the first name found
	xattrLen uint32 // bytes of the attribute area
	inline   bool   // size % blockSize bytes lie behind the inode
}

func (b *writer) plan(root *Node) error {
	if err := b.o.check(); err != nil {
		return err
	}
	if err := b.walk(root); err != nil {
		return err
	}
	if err := b.useBlobs(); err != nil {
		return err
	}
	if err := b.measureXattrs(); err != nil {
		return err
	}
	return b.place()
}

func (o WriteOptions) check() error {
	if c := o.ChunkSize; c < minChunkSize || c > maxChunkSize || c&(c-1) != 0 {
		return fmt.Errorf("chunk size %d: must be a power of two from %d to %d", c, minChunkSize, maxChunkSize)
	}
	if int(o.Codec) >= len(codecFlags) {
		return fmt.Errorf("codec %d: RAFS knows 0 to %d", o.Codec, len(codecFlags)-1)
	}
	if int(o.Digester) >= len(digesterFlags) {
		return fmt.Errorf("digester %d: RAFS knows 0 to %d", o.Digester, len(digesterFlags)-1)
	}
	return nil
}

// emit writes the image (map of the file: rafs-v6-format 1.1).
func (b *writer) emit(out *output) error {
	b.emitSuper(out)
	b.emitBlobs(out)
	for _, p := range b.order {
		out.pad(p.at)
		switch i := &b.inodes[p.inode]; p.what {
		case pieceInode:
			b.emitInode(out, p.inode)
		case pieceBody:
			b.emitBody(out, i, i.bodyLen())
		case pieceShared:
			b.shared.emit(out)
		}
		if out.err != nil {
			return out.err
		}
	}
	b.emitChunks(out)
	out.pad(b.l.size)
	if out.err != nil {
		return out.err
	}
	return out.w.Flush()
}

// emitInode writes an extended inode, its attributes and its tail or chunk
// indexes (rafs-v6-format 2.1).
func (b *writer) emitInode(out *output, id uint32) {
	i := &b.inodes[id]
	n := i.n
	var p [inodeSize]byte
	le := binary.LittleEndian
	le.PutUint16(p[0:], 1|uint16(i.layout())<<1) // bit 0: extended
	if i.xattrLen > 0 {
		le.PutUint16(p[2:], uint16((i.xattrLen-xattrHeaderSize)/4+1))
	}
	le.PutUint16(p[4:], uint16(n.Mode))
	le.PutUint64(p[8:], uint64(i.size))
	le.PutUint32(p[16:], b.inodeUnion(i))
	le.PutUint32(p[20:], id+1)
	le.PutUint32(p[24:], n.UID)
	le.PutUint32(p[28:], n.GID)
	le.PutUint64(p[32:], uint64(n.Sec))
	le.PutUint32(p[40:], n.Nsec)
	le.PutUint32(p[44:], i.nlink)
	out.write(p[:])
	b.emitXattrs(out, i)
	switch {
	case n.Mode&typeMask == typeReg:
		b.emitIndexes(out, n)
	case i.inline:
		b.emitTail(out, i)
	}
}

// inodeUnion returns i_u.
func (b *writer) inodeUnion(i *winode) uint32 {
	switch n := i.n; n.Mode & typeMask {
	case typeReg:
		return b.chunkFormat(n)
	case typeChr, typeBlk: // new_encode_dev of linux/kdev_t.h
		return n.Minor&0xff | n.Major<<8 | n.Minor&^0xff<<12
	default:
		return uint32(i.body / blockSize)
	}
}

// emitBody writes the first n bytes of a directory's or symlink's data.
func (b *writer) emitBody(out *output, i *winode, n int64) {
	if i.n.Mode&typeMask == typeLnk {
		out.writeString(i.n.Target[:n])
		return
	}
	b.emitDirents(out, i, 0, n)
}

// emitTail writes what lies behind the last full block.
func (b *writer) emitTail(out *output, i *winode) {
	if i.n.Mode&typeMask == typeLnk {
		out.writeString(i.n.Target[i.bodyLen():])
		return
	}
	b.emitDirents(out, i, i.bodyLen(), i.size)
}

// An output is a stream that knows its offset and keeps its first error.
type output struct {
	w   *bufio.Writer
	at  int64
	err error
}

func (o *output) write(p []byte) {
	if o.err != nil {
		return
	}
	n, err := o.w.Write(p)
	o.at, o.err = o.at+int64(n), err
}

func (o *output) writeString(s string) {
	if o.err != nil {
		return
	}
	n, err := o.w.WriteString(s)
	o.at, o.err = o.at+int64(n), err
}

var zeros [blockSize]byte

// pad writes zeros up to offset at.
func (o *output) pad(at int64) {
	if at < o.at {
		o.err = cmp.Or(o.err, errors.New("internal error: two parts of the image overlap"))
	}
	for o.err == nil && o.at < at {
		o.write(zeros[:min(at-o.at, blockSize)])
	}
}

// A piece is a run of bytes of the metadata area.
type piece struct {
	at    int64
	inode uint32
	what  pieceKind
}

type pieceKind uint8

const (
	pieceInode  pieceKind = iota // the inode and what follows it directly
	pieceBody                    // the blocks of a directory or symlink
	pieceShared                  // the shared attributes
)

func (b *writer) sortPieces() {
	slices.SortFunc(b.order, func(x, y piece) int { return cmp.Compare(x.at, y.at) })
}
