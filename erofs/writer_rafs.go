package erofs

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
)

// RAFS's additions to EROFS (rafs-v6-format 1.2 to 1.7).
const (
	superOffset   = 1024
	extSuper      = 1152
	deviceTable   = 1408
	deviceSize    = 128
	blobEntrySize = 256
	chunkInfoSize = 80
	idSize        = 64

	minChunkSize = 1 << 12
	maxChunkSize = 1 << 24
	maxBlobs     = 254     // index + 1 must fit the low byte of a device id
	maxChunkNo   = 1 << 24 // chunks of one blob
	deviceGap    = 512 << 10

	maxKernelChunk = blockSize << 31 // its exponent has 5 bits

	flagExplicitIDs    = 0x10
	flagHasXattr       = 0x20
	flagInlinedDigests = 0x100
	flagNoEncryption   = 0x1000000

	featureInlinedDigests = 0x20
	featureEncrypted      = 0x100
)

var (
	codecFlags    = [...]uint64{0x1, 0x2, 0x40, 0x80} // none, lz4_block, gzip, zstd
	digesterFlags = [...]uint64{0x4, 0x8}             // BLAKE3, SHA-256
)

// A usedBlob is a blob that some file refers to.
type usedBlob struct {
	*Blob
	mapped uint32   // start block in the unified address space
	used   []uint64 // bit set over Blob.Chunks
}

// useBlobs checks every chunk reference, numbers the blobs in order of first use
// and makes the chunk table.
func (b *writer) useBlobs() error {
	b.blobSlot = make([]int, len(b.o.Blobs))
	for id := range b.inodes {
		n := b.inodes[id].n
		for k, ref := range n.Chunks {
			if err := b.useChunk(n, k, ref); err != nil {
				return fmt.Errorf("%s: chunk %d: %w", b.path(uint32(id)), k, err)
			}
		}
	}
	if len(b.blobs) > maxBlobs {
		return fmt.Errorf("the files lie in %d data blobs, an image holds at most %d: put several layers into one blob", len(b.blobs), maxBlobs)
	}
	if err := b.checkIDs(); err != nil {
		return err
	}
	b.listChunks()
	return nil
}

// useChunk notes that chunk k of file n is ref.
func (b *writer) useChunk(n *Node, k int, ref ChunkRef) error {
	if int64(ref.Blob) >= int64(len(b.o.Blobs)) {
		return fmt.Errorf("is in blob %d of %d", ref.Blob, len(b.o.Blobs))
	}
	blob := &b.o.Blobs[ref.Blob]
	if int64(ref.Chunk) >= int64(len(blob.Chunks)) {
		return fmt.Errorf("is number %d of %d in blob %s", ref.Chunk, len(blob.Chunks), blob.ID)
	}
	slot := b.blobSlot[ref.Blob] - 1
	if slot < 0 {
		if err := blob.check(b.o.ChunkSize); err != nil {
			return err
		}
		b.blobs = append(b.blobs, usedBlob{Blob: blob, used: make([]uint64, (len(blob.Chunks)+63)/64)})
		slot = len(b.blobs) - 1
		b.blobSlot[ref.Blob] = slot + 1
	}
	size := int64(b.o.ChunkSize)
	info := &blob.Chunks[ref.Chunk]
	if want := min(size, n.Size-int64(k)*size); info.Len != want {
		return fmt.Errorf("has %d bytes, the file has %d there", info.Len, want)
	}
	word, bit := &b.blobs[slot].used[ref.Chunk/64], uint64(1)<<(ref.Chunk%64)
	if *word&bit != 0 {
		return nil
	}
	*word |= bit
	if err := info.check(blob); err != nil {
		return fmt.Errorf("number %d of blob %s: %w", ref.Chunk, blob.ID, err)
	}
	return nil
}

// check compares the blob's entry with what the image says of it.
func (b *Blob) check(chunkSize uint32) error {
	le := binary.LittleEndian
	e := b.Entry[:]
	bad := func(format string, a ...any) error {
		return fmt.Errorf("blob %s: %w", b.ID, fmt.Errorf(format, a...))
	}
	switch count := le.Uint32(e[72:]); {
	case len(b.ID) == 0 || len(b.ID) > idSize || !alphanumeric(b.ID):
		return fmt.Errorf("blob id %.80q: must be 1 to %d letters and digits", b.ID, idSize)
	case b.Size <= 0 || b.Size%blockSize != 0 || b.Size/blockSize > math.MaxUint32:
		return bad("cache file of %d bytes: must be a multiple of %d below 16 TiB", b.Size, blockSize)
	case le.Uint32(e[68:]) != chunkSize:
		return bad("its chunk size is %d, the image's is %d: convert all layers with one chunk size", le.Uint32(e[68:]), chunkSize)
	case count == 0 || count > maxChunkNo:
		return bad("its entry counts %d chunks: must be 1 to %d", count, maxChunkNo)
	case le.Uint64(e[96:]) != uint64(b.Size):
		return bad("its entry says %d bytes of cache file, not %d", le.Uint64(e[96:]), b.Size)
	case le.Uint32(e[84:])&featureEncrypted != 0:
		return bad("encrypted data blobs: %w", errors.ErrUnsupported)
	}
	return nil
}

func alphanumeric(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

func (c *ChunkInfo) check(b *Blob) error {
	switch {
	case c.Off < 0 || c.Off%blockSize != 0 || c.Off > b.Size-c.Len:
		return fmt.Errorf("[%d, +%d) of the cache file: must start at a multiple of %d and end by %d", c.Off, c.Len, blockSize, b.Size)
	case c.Index >= binary.LittleEndian.Uint32(b.Entry[72:]):
		return fmt.Errorf("index %d in a blob of %d chunks", c.Index, binary.LittleEndian.Uint32(b.Entry[72:]))
	case c.COff < 0 || c.CLen < 0 || c.CLen > math.MaxUint32:
		return fmt.Errorf("stored bytes [%d, +%d) are out of range", c.COff, c.CLen)
	}
	return nil
}

func (b *writer) checkIDs() error {
	seen := make(map[string]bool, len(b.blobs))
	for _, u := range b.blobs {
		if seen[u.ID] {
			return fmt.Errorf("blob %s is listed twice: refer to its first position", u.ID)
		}
		seen[u.ID] = true
	}
	return nil
}

// listChunks makes the chunk table: what some file uses, sorted by digest and
// blob as nydus-image sorts it.
func (b *writer) listChunks() {
	for pos, slot := range b.blobSlot {
		if slot == 0 {
			continue
		}
		for w, word := range b.blobs[slot-1].used {
			for ; word != 0; word &= word - 1 {
				b.chunks = append(b.chunks, ChunkRef{uint32(pos), uint32(w*64 + bits.TrailingZeros64(word))})
			}
		}
	}
	slices.SortFunc(b.chunks, func(x, y ChunkRef) int {
		cx, cy := b.chunk(x), b.chunk(y)
		return cmp.Or(bytes.Compare(cx.Digest[:], cy.Digest[:]),
			cmp.Compare(b.blobSlot[x.Blob], b.blobSlot[y.Blob]), cmp.Compare(cx.Index, cy.Index))
	})
}

func (b *writer) chunk(r ChunkRef) *ChunkInfo { return &b.o.Blobs[r.Blob].Chunks[r.Chunk] }

// placeDevices lays the blobs behind the bootstrap in the unified address space,
// each at a multiple of 512 KiB (rafs-v6-format 1.4).
func (b *writer) placeDevices() error {
	at := b.l.size
	for k := range b.blobs {
		at = align(at, deviceGap)
		if at+b.blobs[k].Size > math.MaxUint32*blockSize {
			return errors.New("the data blobs together exceed the 16 TiB that 32-bit block numbers reach")
		}
		b.blobs[k].mapped = uint32(at / blockSize)
		at += b.blobs[k].Size
	}
	return nil
}

// emitSuper writes the superblock, RAFS's extension and the device slots.
func (b *writer) emitSuper(out *output) {
	le := binary.LittleEndian
	p := make([]byte, deviceTable+deviceSize*len(b.blobs))
	s := p[superOffset:]
	le.PutUint32(s[0:], 0xe0f5e1e2)
	le.PutUint32(s[8:], 0x40000000) // compat: RAFS v6
	s[12] = 12                      // log2(blockSize)
	le.PutUint16(s[14:], uint16(b.l.nid(b.inodes[0].at)))
	le.PutUint64(s[16:], b.names())
	le.PutUint32(s[36:], b.deviceBlocks())
	le.PutUint32(s[40:], uint32(b.l.meta/blockSize))
	le.PutUint32(s[80:], 0xc) // incompat: chunked files, device table; nydusd wants exactly these
	le.PutUint16(s[86:], uint16(len(b.blobs)))
	le.PutUint16(s[88:], deviceTable/deviceSize)

	x := p[extSuper:]
	le.PutUint64(x[0:], b.flags())
	le.PutUint64(x[8:], uint64(b.l.blobTable))
	le.PutUint32(x[16:], uint32(len(b.blobs)*blobEntrySize))
	le.PutUint32(x[20:], b.o.ChunkSize)
	if len(b.chunks) > 0 {
		le.PutUint64(x[24:], uint64(b.l.chunkTable))
		le.PutUint64(x[32:], uint64(len(b.chunks)*chunkInfoSize))
	}
	if b.l.prefetch > 0 {
		le.PutUint64(x[40:], uint64(b.l.prefetch))
		le.PutUint32(x[48:], 4)
	}
	for k, u := range b.blobs {
		d := p[deviceTable+k*deviceSize:]
		copy(d[:idSize], u.ID)
		le.PutUint32(d[64:], uint32(u.Size/blockSize))
		le.PutUint32(d[68:], u.mapped)
	}
	out.write(p)
}

// names counts the tree's nodes, each name of a hard link for itself.
func (b *writer) names() uint64 {
	n := uint64(len(b.dirents)) + 1
	for _, i := range b.inodes {
		if i.n.Mode&typeMask == typeDir {
			n -= 2 // "." and ".."
		}
	}
	return n
}

func (b *writer) deviceBlocks() uint32 {
	var n int64
	for _, u := range b.blobs {
		n += u.Size / blockSize
	}
	return uint32(n) // placeDevices has checked the sum
}

func (b *writer) flags() uint64 {
	f := codecFlags[b.o.Codec] | digesterFlags[b.o.Digester] | flagExplicitIDs | flagNoEncryption
	if b.xattrs {
		f |= flagHasXattr
	}
	inlined := len(b.blobs) > 0
	for _, u := range b.blobs {
		inlined = inlined && binary.LittleEndian.Uint32(u.Entry[84:])&featureInlinedDigests != 0
	}
	if inlined {
		f |= flagInlinedDigests
	}
	return f
}

// emitBlobs writes the blob table and behind it the prefetch table: the root's
// nid, which stands for everything.
func (b *writer) emitBlobs(out *output) {
	out.pad(b.l.blobTable)
	for k, u := range b.blobs {
		e := u.Entry
		clear(e[:idSize])
		copy(e[:idSize], u.ID)
		binary.LittleEndian.PutUint32(e[64:], uint32(k))
		out.write(e[:])
	}
	if b.l.prefetch > 0 {
		out.write(binary.LittleEndian.AppendUint32(nil, uint32(b.l.nid(b.inodes[0].at))))
	}
}

// chunkFormat returns i_u of a regular file: the size of a kernel chunk, and that
// indexes have 8 bytes. When the file's chunks follow each other in one blob one
// kernel chunk spans it, so that the kernel's reads are not cut at every chunk
// (rafs-v6-format 2.4); it then uses the first index only.
func (b *writer) chunkFormat(n *Node) uint32 {
	size := uint64(b.o.ChunkSize)
	if len(n.Chunks) > 1 && n.Size <= maxKernelChunk && b.contiguous(n.Chunks) {
		size = 1 << bits.Len64(uint64(n.Size-1))
	}
	shift := bits.Len64(size/blockSize) - 1
	return 0x20 | uint32(shift)
}

// contiguous reports whether chunks c are one run of their blob's cache file.
// All but the last have the full chunk size.
func (b *writer) contiguous(c []ChunkRef) bool {
	first := b.chunk(c[0])
	for k, ref := range c {
		if ref.Blob != c[0].Blob || b.chunk(ref).Off != first.Off+int64(k)*int64(b.o.ChunkSize) {
			return false
		}
	}
	return true
}

// emitIndexes writes the chunk indexes of a file, one for each chunk of the
// image's chunk size whatever the kernel's is. RAFS keeps the chunk's index in
// the bytes that the kernel masks out.
func (b *writer) emitIndexes(out *output, n *Node) {
	if len(n.Chunks) == 0 {
		return
	}
	out.pad(align(out.at, indexSize))
	var p [indexSize]byte
	for _, ref := range n.Chunks {
		c := b.chunk(ref)
		binary.LittleEndian.PutUint16(p[0:], uint16(c.Index))
		p[2] = byte(b.blobSlot[ref.Blob]) // index + 1
		p[3] = byte(c.Index >> 16)
		binary.LittleEndian.PutUint32(p[4:], uint32(c.Off/blockSize))
		out.write(p[:])
	}
}

// emitChunks writes the chunk table.
func (b *writer) emitChunks(out *output) {
	out.pad(b.l.chunkTable)
	le := binary.LittleEndian
	for _, ref := range b.chunks {
		c := b.chunk(ref)
		var p [chunkInfoSize]byte
		copy(p[:], c.Digest[:])
		le.PutUint32(p[32:], uint32(b.blobSlot[ref.Blob]-1))
		if c.Compressed {
			le.PutUint32(p[36:], 1)
		}
		le.PutUint32(p[40:], uint32(c.CLen))
		le.PutUint32(p[44:], uint32(c.Len))
		le.PutUint64(p[48:], uint64(c.COff))
		le.PutUint64(p[56:], uint64(c.Off))
		le.PutUint64(p[64:], uint64(c.FileOff))
		le.PutUint32(p[72:], c.Index)
		out.write(p[:])
	}
}
