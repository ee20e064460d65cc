package erofs

import (
	"cmp"
	"fmt"
	"slices"
)

// Numbers of the format (rafs-v6-format 1 and 2; fs/erofs/erofs_fs.h, 6.18).
const (
	blockSize  = 4096
	inodeSize  = 64 // extended
	slotSize   = 32 // unit of a nid
	direntSize = 12
	indexSize  = 8

	layoutPlain  = 0
	layoutInline = 2
	layoutChunks = 4

	typeMask = 0xf000
	typeFifo = 0x1000
	typeChr  = 0x2000
	typeDir  = 0x4000
	typeBlk  = 0x6000
	typeReg  = 0x8000
	typeLnk  = 0xa000
	typeSock = 0xc000

	// maxBootstrap is nydusd's bound; it also keeps every nid within the 32
	// bits of the prefetch table.
	maxBootstrap = 2 << 30
)

// fileTypes maps the type bits of st_mode to the type in a dirent; 0 is none.
var fileTypes = [16]byte{
	typeReg >> 12: 1, typeDir >> 12: 2, typeChr >> 12: 3, typeBlk >> 12: 4,
	typeFifo >> 12: 5, typeSock >> 12: 6, typeLnk >> 12: 7,
}

// A layout is where the parts of the image lie, in bytes.
type layout struct {
	blobTable  int64
	prefetch   int64 // 0: none
	meta       int64 // the area that nids count from
	chunkTable int64
	size       int64 // of the image
}

func (l layout) nid(at int64) uint64 { return uint64(at-l.meta) / slotSize }

func (i *winode) layout() int {
	switch {
	case i.n.Mode&typeMask == typeReg:
		return layoutChunks
	case i.inline:
		return layoutInline
	}
	return layoutPlain
}

// bodyLen returns the bytes of a directory or symlink that are not inline.
func (i *winode) bodyLen() int64 {
	if i.inline {
		return i.size - i.size%blockSize
	}
	return i.size
}

// place gives every part of the image its offset.
func (b *writer) place() error {
	n := int64(len(b.blobs))
	// nydusd takes the end of the device slots as if each were as large as a
	// blob table entry and refuses a blob table before it.
	b.l.blobTable = align(deviceTable+n*blobEntrySize, blockSize)
	end := b.l.blobTable + n*blobEntrySize
	if n > 0 {
		b.l.prefetch = end
		end += 4
	}
	b.l.meta = align(end, blockSize)
	// The first block stays empty so that no inode has nid 0. The root follows,
	// as in nydus's images: its nid must fit 16 bits.
	s := space{end: b.l.meta + blockSize}
	for id := range b.inodes {
		b.placeInode(&s, uint32(id))
		if id == 0 && b.shared.size > 0 {
			b.shared.at = s.run(b.shared.size)
			b.order = append(b.order, piece{b.shared.at, 0, pieceShared})
		}
	}
	b.sortPieces()
	b.l.chunkTable = s.end
	b.l.size = align(s.end+int64(len(b.chunks))*chunkInfoSize, blockSize)
	if b.l.size > maxBootstrap {
		return fmt.Errorf("the bootstrap would have %d bytes: at most %d; split the image", b.l.size, int64(maxBootstrap))
	}
	return b.placeDevices()
}

// placeInode finds room for an inode, its attributes and what else is read
// with it. They lie in one block unless they are larger than one.
func (b *writer) placeInode(s *space, id uint32) {
	i := &b.inodes[id]
	need, body := inodeSize+int64(i.xattrLen), int64(0)
	switch i.n.Mode & typeMask {
	case typeReg:
		need = align(need, indexSize) + int64(len(i.n.Chunks))*indexSize
	case typeDir, typeLnk:
		tail := i.size % blockSize
		if i.inline = tail > 0 && need+tail <= blockSize; i.inline {
			need += tail
		}
		body = i.bodyLen()
	}
	i.at = s.take(need)
	b.order = append(b.order, piece{i.at, id, pieceInode})
	if body > 0 {
		i.body = s.blocks(body)
		b.order = append(b.order, piece{i.body, id, pieceBody})
	}
}

// A space hands out the metadata area block by block and remembers blocks that
// have room at their end: inodes with a large tail leave it, the small ones that
// follow fill it.
type space struct {
	end   int64
	holes []hole // oldest first
}

type hole struct{ at, n int64 }

// maxHoles bounds the search. Breadth-first, all directories of a level come
// before their files, so that their holes have to wait.
const maxHoles = 256

// take returns the offset of n bytes that cross no block boundary when they fit
// one block.
func (s *space) take(n int64) int64 {
	for k := range s.holes {
		h := &s.holes[k]
		if n > h.n {
			continue
		}
		at := h.at
		used := align(n, slotSize)
		h.at, h.n = at+used, h.n-used
		if h.n < inodeSize {
			s.holes = slices.Delete(s.holes, k, k+1)
		}
		return at
	}
	return s.run(n)
}

// run returns the offset of n bytes that start a new block.
func (s *space) run(n int64) int64 {
	at := s.end
	s.end = align(at+n, blockSize)
	if start := align(at+n, slotSize); s.end-start >= inodeSize {
		if len(s.holes) == maxHoles {
			least := slices.MinFunc(s.holes, func(x, y hole) int { return cmp.Compare(x.n, y.n) })
			s.holes = slices.DeleteFunc(s.holes, func(h hole) bool { return h == least })
		}
		s.holes = append(s.holes, hole{start, s.end - start})
	}
	return at
}

// blocks returns the offset of n bytes of a directory or symlink. Nothing else
// shares their last block: the kernel looks for a last name's end beyond i_size.
func (s *space) blocks(n int64) int64 {
	at := s.end
	s.end = align(at+n, blockSize)
	return at
}

// align rounds n up to a multiple of unit, a power of two.
func align(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }
