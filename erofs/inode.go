package erofs

import "fmt"

// A Layout says how an inode's data are stored.
type Layout uint8

// The layouts that can be read; the others are compressed.
const (
	Plain  Layout = layoutPlain  // whole blocks
	Inline Layout = layoutInline // whole blocks, and the rest behind the inode
	Chunks Layout = layoutChunks // chunk indexes behind the inode
)

// String returns the layout's name as in erofs_fs.h.
func (l Layout) String() string {
	switch l {
	case Plain:
		return "flat-plain"
	case Inline:
		return "flat-inline"
	case Chunks:
		return "chunk-based"
	}
	return fmt.Sprintf("layout %d", uint8(l))
}

// An Inode is a file, directory or other object of an image.
type Inode struct {
	NID          uint64
	Mode         uint32 // st_mode: type bits and permissions
	UID, GID     uint32
	Nlink        uint32
	Size         int64  // bytes
	Major, Minor uint32 // character and block devices
	Sec          int64  // mtime, seconds since 1970
	Nsec         uint32 // mtime, nanoseconds
	Ino          uint32 // i_ino: a running number, which user space does not see
	Layout       Layout

	union    uint32 // i_u
	off      int64  // in the image, bytes
	headLen  int64  // 32 or 64
	xattrLen int64  // of the attribute area
}

// IsDir reports whether n is a directory.
func (n Inode) IsDir() bool { return n.Mode&typeMask == typeDir }

// IsRegular reports whether n is a regular file.
func (n Inode) IsRegular() bool { return n.Mode&typeMask == typeReg }

// tail is where the inline data or chunk indexes begin.
func (n Inode) tail() int64 { return n.off + n.headLen + n.xattrLen }

// Inode reads the inode with number nid (rafs-v6-format 2.1).
func (m *Image) Inode(nid uint64) (Inode, error) {
	n, err := m.inode(nid)
	if err != nil {
		return Inode{}, fmt.Errorf("inode %d: %w", nid, err)
	}
	return n, nil
}

func (m *Image) inode(nid uint64) (Inode, error) {
	meta := int64(m.sb.MetaBlkaddr) << m.sb.BlockBits // within the image, see checkFeatures
	if nid >= uint64(m.pages.size-meta)/slotSize {
		return Inode{}, bad("is outside of the image")
	}
	n := Inode{NID: nid, off: meta + int64(nid)*slotSize, headLen: compactInodeSize}
	p, err := m.pages.read(n.off, compactInodeSize)
	if err != nil {
		return Inode{}, err
	}
	format := le.Uint16(p)
	n.Layout = Layout(format >> 1 & 7)
	switch {
	case format>>4 != 0:
		return Inode{}, bad("format 0x%04x has unknown bits", format)
	case n.Layout != Plain && n.Layout != Inline && n.Layout != Chunks:
		return Inode{}, unsupported("compressed data (layout %d)", uint8(n.Layout))
	}
	if count := int64(le.Uint16(p[2:])); count > 0 {
		n.xattrLen = xattrHeaderSize + (count-1)*4
	}
	n.Mode = uint32(le.Uint16(p[4:]))
	n.union = le.Uint32(p[16:])
	n.Ino = le.Uint32(p[20:])
	if format&1 == 0 {
		n.Nlink = uint32(le.Uint16(p[6:]))
		n.Size = int64(le.Uint32(p[8:]))
		n.UID, n.GID = uint32(le.Uint16(p[24:])), uint32(le.Uint16(p[26:]))
		n.Sec, n.Nsec = int64(m.sb.Epoch), m.sb.EpochNsec
	} else {
		n.headLen = inodeSize
		if p, err = m.pages.read(n.off, inodeSize); err != nil {
			return Inode{}, err
		}
		n.Size = int64(le.Uint64(p[8:]))
		n.UID, n.GID = le.Uint32(p[24:]), le.Uint32(p[28:])
		n.Sec, n.Nsec = int64(le.Uint64(p[32:])), le.Uint32(p[40:])
		n.Nlink = le.Uint32(p[44:])
	}
	return n, m.checkInode(&n)
}

// checkInode checks what everything else relies on, and decodes i_u.
func (m *Image) checkInode(n *Inode) error {
	if n.Size < 0 {
		return bad("size 0x%x is negative", uint64(n.Size))
	}
	if n.tail() > m.pages.size {
		return bad("its attributes end behind the image")
	}
	switch n.Mode & typeMask {
	case typeReg:
	case typeDir, typeLnk:
		if n.Layout == Chunks {
			return bad("mode %o with chunk-based data", n.Mode)
		}
	case typeChr, typeBlk: // new_decode_dev of linux/kdev_t.h
		n.Major = n.union >> 8 & 0xfff
		n.Minor = n.union&0xff | n.union>>12&0xfff00
	case typeFifo, typeSock:
	default:
		return bad("mode %o has no known type", n.Mode)
	}
	return nil
}

// Readlink returns the target of the symbolic link n: 1 to 4095 bytes.
func (m *Image) Readlink(n Inode) (string, error) {
	target, err := m.readlink(n)
	if err != nil {
		return "", fmt.Errorf("inode %d: symbolic link: %w", n.NID, err)
	}
	return target, nil
}

func (m *Image) readlink(n Inode) (string, error) {
	if n.Mode&typeMask != typeLnk {
		return "", bad("mode %o is none", n.Mode)
	}
	if n.Size < 1 || n.Size > maxTarget {
		return "", bad("target of %d bytes: must have 1 to %d", n.Size, maxTarget)
	}
	var target []byte
	for off := int64(0); off < n.Size; off += m.sb.BlockSize() {
		p, err := m.flatBlock(n, off)
		if err != nil {
			return "", err
		}
		target = append(target, p...)
	}
	for _, c := range target {
		if c == 0 {
			return "", bad("target contains a NUL")
		}
	}
	return string(target), nil
}

// flatBlock returns n's data in the block that starts at off of a directory or
// symbolic link, up to its size.
func (m *Image) flatBlock(n Inode, off int64) ([]byte, error) {
	at, end, err := m.flat(n)
	if err != nil {
		return nil, err
	}
	bs := m.sb.BlockSize()
	if off >= end {
		return m.pages.read(n.tail(), n.Size-off)
	}
	return m.pages.read(at+off, min(bs, n.Size-off))
}

// flat returns where the whole blocks of a flat inode begin in the address space
// of the image, and how many of the inode's bytes they hold. The rest lies
// behind the inode and must not cross a block boundary (erofs_map_blocks,
// fs/erofs/data.c, 6.18).
func (m *Image) flat(n Inode) (at, end int64, err error) {
	bs := m.sb.BlockSize()
	end = n.Size
	if n.Layout == Inline {
		end -= n.Size % bs
		if rest := n.Size - end; n.tail()%bs+rest > bs {
			return 0, 0, bad("%d inline bytes at %d cross a block boundary", rest, n.tail())
		}
	}
	return int64(n.union) << m.sb.BlockBits, end, nil
}
