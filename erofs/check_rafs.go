package erofs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"
)

const (
	maxCompressed = 1 << 40 // bytes of a stored blob, nydusd's bound
	rafsSlotoff   = deviceTable / deviceSize
	codecMask     = 0xc3 // of the flags: none, lz4_block, gzip, zstd
	digesterMask  = 0xc
)

// tables checks what the superblock points to.
func (c *checker) tables() error {
	m := c.m
	checks := []func() error{c.superblock, c.devices}
	if m.rafs != nil {
		checks = append(checks, c.rafsSuperblock, c.blobTable)
	}
	for _, check := range checks {
		if err := c.report(check()); err != nil {
			return err
		}
	}
	claims := [][2]int64{
		{superOffset, superSize + 16*int64(m.sb.ExtSlots)},
		{int64(m.sb.DevtSlotoff) * deviceSize, int64(len(m.devices)) * deviceSize},
	}
	if m.rafs != nil {
		claims = append(claims, [2]int64{extSuper, deviceTable - extSuper},
			[2]int64{m.rafs.BlobTable, m.rafs.BlobTableLen}, [2]int64{m.rafs.ChunkTable, m.rafs.ChunkTableLen})
	}
	for _, t := range claims {
		if t[1] == 0 {
			continue // an image without blobs has its root where the blob table would be
		}
		if err := c.claim(t[0], t[1]); err != nil {
			if err := c.report(fmt.Errorf("table: %w", err)); err != nil {
				return err
			}
		}
	}
	return nil
}

// superblock refuses what the kernel would act on although the features that
// it belongs to are off (erofs_read_superblock, fs/erofs/super.c, 6.18).
func (c *checker) superblock() error {
	s := c.m.sb
	switch {
	case s.Compression != 0:
		return unsupported("superblock: compression 0x%x", s.Compression)
	case s.XattrPrefixCount != 0:
		return unsupported("superblock: %d attribute name prefixes", s.XattrPrefixCount)
	case s.PackedNID != 0:
		return unsupported("superblock: packed inode %d", s.PackedNID)
	case s.EpochNsec >= 1e9:
		return bad("superblock: time with %d ns", s.EpochNsec)
	case c.m.rafs == nil && int64(s.Blocks)<<s.BlockBits > c.m.pages.size:
		return bad("superblock: %d blocks in an image of %d bytes", s.Blocks, c.m.pages.size)
	case int64(s.XattrBlkaddr)<<s.BlockBits > c.m.pages.size:
		return bad("superblock: shared attributes at block %d, behind the end of the image", s.XattrBlkaddr)
	}
	return nil
}

func (c *checker) devices() error {
	m := c.m
	if len(m.devices) > maxBlobs {
		return unsupported("%d devices, more than %d", len(m.devices), maxBlobs)
	}
	end := m.pages.size // of the metadata, which the unified address space must leave alone
	if m.rafs == nil {
		end = int64(m.sb.Blocks) << m.sb.BlockBits
	}
	seen := map[string]bool{}
	var mapped [][2]int64
	var blocks int64
	for i, d := range m.devices {
		start, stop := int64(d.MappedBlkaddr), int64(d.MappedBlkaddr)+int64(d.Blocks)
		switch {
		case !safeTag(d.Tag) && (d.Tag != "" || m.rafs != nil):
			return bad("device %d: tag %.80q: must be a blob id or another plain name", i, d.Tag)
		case d.Tag != "" && seen[d.Tag]:
			return bad("device %d: tag %s for the second time", i, d.Tag)
		case d.Blocks == 0:
			return bad("device %d: its size is not given, so nothing in it can be checked", i)
		case start != 0 && start<<m.sb.BlockBits < end:
			return bad("device %d: mapped at block %d, inside of the image", i, start)
		case stop > 1<<32:
			return bad("device %d: mapped at block %d, so that it ends behind the last one", i, start)
		}
		seen[d.Tag] = true
		blocks += int64(d.Blocks)
		if start != 0 {
			mapped = append(mapped, [2]int64{start, stop})
		}
	}
	if blocks >= 1<<32 {
		return bad("devices of %d blocks together: must be below 2^32", blocks)
	}
	if overlap(mapped) {
		return bad("devices are mapped over each other")
	}
	return nil
}

// overlap reports whether any of the intervals [from, end) begins before the
// previous one ends; it sorts them.
func overlap(list [][2]int64) bool {
	slices.SortFunc(list, func(x, y [2]int64) int { return slices.Compare(x[:], y[:]) })
	for i := 1; i < len(list); i++ {
		if list[i][0] < list[i-1][1] {
			return true
		}
	}
	return false
}

// safeTag reports whether s can be a file name and a cache key everywhere.
func safeTag(s string) bool {
	return s != "" && s[0] != '.' && s[0] != '-' && strings.IndexFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && !strings.ContainsRune("._-", r)
	}) < 0
}

// rafsSuperblock checks RAFS's own fields and what nydusd demands of the others
// (rafs-v6-format 1.2 and 1.3).
func (c *checker) rafsSuperblock() error {
	m, s, x := c.m, c.m.sb, c.m.rafs
	if m.pages.size > c.l.Size {
		return bad("bootstrap of %d bytes: at most %d", m.pages.size, c.l.Size)
	}
	tail, err := m.pages.read(superOffset+90, superSize-90)
	if err != nil {
		return err
	}
	switch {
	case x.Flags&flagTarfs != 0:
		return unsupported("RAFS image of a bare tar (tarfs)")
	case x.Flags&flagEncrypted != 0:
		return unsupported("encrypted RAFS image")
	case s.BlockBits != 12:
		return bad("RAFS with blocks of 2^%d bytes: must be 4096", s.BlockBits)
	case m.pages.size%blockSize != 0:
		return bad("bootstrap of %d bytes: must be a multiple of %d; is it complete?", m.pages.size, blockSize)
	case s.Checksum != 0 || s.ExtSlots != 0 || slices.ContainsFunc(tail, func(b byte) bool { return b != 0 }):
		return bad("superblock: fields are set that RAFS leaves zero")
	case s.DevtSlotoff != rafsSlotoff:
		return bad("superblock: device table in slot %d instead of %d", s.DevtSlotoff, rafsSlotoff)
	case s.FeatureCompat&compatChecksum != 0:
		return bad("superblock: compatible features 0x%x with a checksum, which RAFS has not", s.FeatureCompat)
	case x.Flags&^rafsFlags != 0:
		return unsupported("RAFS flags 0x%x", x.Flags&^rafsFlags)
	case bits.OnesCount64(x.Flags&codecMask) != 1 || bits.OnesCount64(x.Flags&digesterMask) != 1:
		return bad("RAFS flags 0x%x: must name one compression and one digest", x.Flags)
	case x.BlobTableLen > 0 && (x.BlobTable < blockSize || x.BlobTable%blockSize != 0):
		return bad("blob table at %d: must be at a multiple of %d", x.BlobTable, blockSize)
	case x.ChunkTableLen > 0 && (x.ChunkTable < blockSize || x.ChunkTable%blockSize != 0):
		return bad("chunk table at %d: must be at a multiple of %d", x.ChunkTable, blockSize)
	}
	return nil
}

// blobTable compares each entry with its device; the rest of an entry concerns
// who reads the stored blob, not the kernel.
func (c *checker) blobTable() error {
	for i, e := range c.m.blobs {
		d := c.m.devices[i]
		id := strings.TrimRight(string(e[:idSize]), "\x00")
		switch count := le.Uint32(e[72:]); {
		case id != d.Tag:
			return bad("blob %d: id %.80q, its device has the tag %.80q", i, id, d.Tag)
		case le.Uint32(e[64:]) != uint32(i):
			return bad("blob %d: index %d", i, le.Uint32(e[64:]))
		case le.Uint32(e[68:]) != c.m.rafs.ChunkSize:
			return bad("blob %d: chunk size %d instead of the image's %d", i, le.Uint32(e[68:]), c.m.rafs.ChunkSize)
		case count == 0 || count > maxChunkNo:
			return bad("blob %d: %d chunks: must be 1 to %d", i, count, maxChunkNo)
		case le.Uint64(e[96:]) != uint64(d.Blocks)*blockSize:
			return bad("blob %d: cache file of %d bytes, its device has %d blocks", i, le.Uint64(e[96:]), d.Blocks)
		}
	}
	return nil
}

// A tableChunk is an entry of the chunk table in the form that files are
// compared with: 16 bytes, and their order is (blob, index).
type tableChunk struct {
	key   uint32 // blob << 24 | index
	block uint32 // in the blob's cache file
	len   uint32
	entry uint32 // in the chunk table
}

const tableChunkSize = 16

// chunkTable reads the chunk table into c.chunks.
func (c *checker) chunkTable(ctx context.Context) error {
	count := c.m.rafs.ChunkTableLen / chunkInfoSize
	if err := c.grow(count * tableChunkSize); err != nil {
		return fmt.Errorf("chunk table of %d entries: %w", count, err)
	}
	c.chunks = make([]tableChunk, 0, count)
	i := uint32(0)
	for e, err := range c.m.Chunks() {
		if err != nil {
			return err
		}
		if i%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := c.chunkInfo(e); err != nil {
			if err := c.report(fmt.Errorf("chunk table: entry %d: %w", i, err)); err != nil {
				return err
			}
		} else {
			c.chunks = append(c.chunks, tableChunk{e.Blob<<24 | e.Index, uint32(e.Off / blockSize), uint32(e.Len), i})
		}
		i++
	}
	slices.SortFunc(c.chunks, func(x, y tableChunk) int {
		return cmp.Or(cmp.Compare(x.key, y.key), cmp.Compare(x.entry, y.entry))
	})
	return c.sameChunks()
}

// chunkInfo checks one entry by itself. Where its stored bytes lie is for the
// blob's own table to say: here they are zero for batches and approximate for
// gzip layers.
func (c *checker) chunkInfo(e ChunkInfo) error {
	if int64(e.Blob) >= int64(len(c.m.blobs)) {
		return bad("is in blob %d of %d", e.Blob, len(c.m.blobs))
	}
	entry := c.m.blobs[e.Blob]
	count := le.Uint32(entry[72:])
	if le.Uint32(entry[84:])&featureChunkDict != 0 {
		count = maxChunkNo // it counts only the chunks that are used
	}
	size := int64(c.m.devices[e.Blob].Blocks) * blockSize
	switch {
	case e.Index >= count:
		return bad("is number %d of %d in blob %d", e.Index, count, e.Blob)
	case e.Len < 1 || e.Len > int64(c.m.rafs.ChunkSize):
		return bad("has %d bytes: must have 1 to %d", e.Len, c.m.rafs.ChunkSize)
	case e.Off < 0 || e.Off%blockSize != 0 || e.Off > size-e.Len:
		return bad("is at [%d, +%d) of the %d bytes of blob %d", e.Off, e.Len, size, e.Blob)
	case e.COff < 0 || e.COff > maxCompressed:
		return bad("is stored at %d", e.COff)
	}
	return nil
}

// sameChunks refuses two entries for one chunk that differ.
func (c *checker) sameChunks() error {
	for i := 1; i < len(c.chunks); i++ {
		x, y := c.chunks[i-1], c.chunks[i]
		if x.key != y.key {
			continue
		}
		a, errA := c.digest(x)
		b, errB := c.digest(y)
		if err := errors.Join(errA, errB); err != nil {
			return err
		}
		if x.block != y.block || x.len != y.len || !slices.Equal(a, b) {
			err := bad("chunk table: entries %d and %d are for chunk %d of blob %d, and differ", x.entry, y.entry, x.key&0xffffff, x.key>>24)
			if err := c.report(err); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) digest(t tableChunk) ([]byte, error) {
	return c.m.pages.read(c.m.rafs.ChunkTable+int64(t.entry)*chunkInfoSize, digestSize)
}

// file checks where the data of a regular file lie, in RAFS against the chunk
// table.
func (c *checker) file(ctx context.Context, n Inode) error {
	if err := c.claimFile(n); err != nil {
		return c.at(err)
	}
	c.sum.Size += n.Size
	for e, err := range c.m.Extents(n) {
		if err != nil {
			return c.at(err)
		}
		if c.sum.Chunks++; c.sum.Chunks%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if c.m.rafs == nil {
			continue
		}
		if err := c.listed(e); err != nil {
			return c.at(fmt.Errorf("chunk at %d: %w", e.FileOff, err))
		}
	}
	return nil
}

// claimFile claims the inode of a regular file with what follows it. Blocks of
// data may be shared.
func (c *checker) claimFile(n Inode) error {
	if n.Layout == Chunks {
		f, err := c.m.chunkFormat(n)
		if err != nil {
			return err
		}
		return c.claim(n.off, f.at+f.count*f.width-n.off)
	}
	_, end, err := c.m.flat(n)
	if err != nil {
		return err
	}
	return c.claim(n.off, n.tail()-n.off+n.Size-end)
}

// listed looks e up in the chunk table.
func (c *checker) listed(e Extent) error {
	key := uint32(e.Device-1)<<24 | e.Chunk
	if c.next >= len(c.chunks) || c.chunks[c.next].key != key {
		i, ok := slices.BinarySearchFunc(c.chunks, key, func(t tableChunk, key uint32) int { return cmp.Compare(t.key, key) })
		if !ok {
			return bad("chunk %d of blob %d is not in the chunk table", e.Chunk, e.Device-1)
		}
		c.next = i
	}
	t := c.chunks[c.next]
	if int64(t.block)*blockSize != e.Off || int64(t.len) != e.Len {
		return bad("[%d, +%d) of blob %d, in the chunk table chunk %d is [%d, +%d)",
			e.Off, e.Len, e.Device-1, e.Chunk, int64(t.block)*blockSize, t.len)
	}
	c.next++
	return nil
}
