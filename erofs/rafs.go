package erofs

import (
	"fmt"
	"iter"
	"math/bits"
)

// openRAFS reads the extended superblock and the blob table (rafs-v6-format 1.3
// and 1.5).
func (m *Image) openRAFS() error {
	p, err := m.pages.read(extSuper, deviceTable-extSuper)
	if err != nil {
		return fmt.Errorf("RAFS superblock: %w", err)
	}
	x := &RAFS{
		Flags:         le.Uint64(p[0:]),
		BlobTable:     int64(le.Uint64(p[8:])),
		BlobTableLen:  int64(le.Uint32(p[16:])),
		ChunkSize:     le.Uint32(p[20:]),
		ChunkTable:    int64(le.Uint64(p[24:])),
		ChunkTableLen: int64(le.Uint64(p[32:])),
		Prefetch:      int64(le.Uint64(p[40:])),
		PrefetchLen:   int64(le.Uint32(p[48:])),
	}
	if m.sb.FeatureIncompat != incompatRAFS {
		return bad("RAFS image with incompatible features 0x%x: must be exactly 0x%x", m.sb.FeatureIncompat, uint32(incompatRAFS))
	}
	if c := x.ChunkSize; c < minChunkSize || c > maxChunkSize || bits.OnesCount32(c) != 1 {
		return bad("chunk size %d: must be a power of two from %d to %d", c, minChunkSize, maxChunkSize)
	}
	if x.BlobTableLen%blobEntrySize != 0 || x.BlobTableLen/blobEntrySize != int64(len(m.devices)) {
		return bad("blob table of %d bytes for %d devices: must have %d bytes for each", x.BlobTableLen, len(m.devices), blobEntrySize)
	}
	if x.ChunkTableLen%chunkInfoSize != 0 {
		return bad("chunk table of %d bytes: must be a multiple of %d", x.ChunkTableLen, chunkInfoSize)
	}
	if x.ChunkTable < 0 || x.ChunkTableLen < 0 || x.ChunkTableLen > m.pages.size || x.ChunkTable > m.pages.size-x.ChunkTableLen {
		return bad("chunk table [%d, +%d) is outside of the image of %d bytes", x.ChunkTable, x.ChunkTableLen, m.pages.size)
	}
	table, err := m.pages.read(x.BlobTable, x.BlobTableLen)
	if err != nil {
		return fmt.Errorf("blob table: %w", err)
	}
	for len(table) > 0 {
		m.blobs = append(m.blobs, table[:blobEntrySize:blobEntrySize])
		table = table[blobEntrySize:]
	}
	m.rafs = x
	return nil
}

// BlobEntries returns the entries of RAFS's blob table, 256 bytes each, in the
// order of the devices. The caller must not change them.
func (m *Image) BlobEntries() [][]byte { return m.blobs }

// Chunks returns the entries of RAFS's chunk table, in the table's order. It
// holds what the image's files refer to, not all chunks of a blob.
func (m *Image) Chunks() iter.Seq2[ChunkInfo, error] {
	return func(yield func(ChunkInfo, error) bool) {
		if m.rafs == nil {
			return
		}
		const some = 256 // entries a read
		for at := int64(0); at < m.rafs.ChunkTableLen; at += some * chunkInfoSize {
			p, err := m.pages.read(m.rafs.ChunkTable+at, min(some*chunkInfoSize, m.rafs.ChunkTableLen-at))
			if err != nil {
				yield(ChunkInfo{}, fmt.Errorf("chunk table: %w", err))
				return
			}
			for ; len(p) > 0; p = p[chunkInfoSize:] {
				if !yield(parseChunkInfo(p), nil) {
					return
				}
			}
		}
	}
}

// maxPrefetch bounds the prefetch table in entries: it is a hint.
const maxPrefetch = 1 << 16

// Prefetch returns what the image wants fetched before it is read, as nids of files and
// directories, in order; the root's means everything. It is a hint: what lies outside of
// the image is left out (rafs-v6-format 1.6).
func (m *Image) Prefetch() []uint64 {
	if m.rafs == nil || m.rafs.Prefetch <= 0 || m.rafs.Prefetch > m.pages.size {
		return nil
	}
	n := min(m.rafs.PrefetchLen/4, maxPrefetch, (m.pages.size-m.rafs.Prefetch)/4)
	p, err := m.pages.read(m.rafs.Prefetch, n*4)
	if err != nil {
		return nil
	}
	var nids []uint64
	for ; len(p) >= 4; p = p[4:] {
		nid := uint64(le.Uint32(p))
		if nid == 0 {
			break
		}
		nids = append(nids, nid)
	}
	return nids
}
