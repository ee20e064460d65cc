package chunk

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Limits of the format (rafs-v6-format 1.5 and 9.1) and our own bounds.
const (
	// MaxUnitLen bounds what one unit takes in the cache file, in bytes. A chunk is
	// at most 16 MiB; a batch of tiny chunks takes a page for each.
	MaxUnitLen = 64 << 20

	pageSize      = 4096
	entrySize     = 256
	maxChunkSize  = 16 << 20
	maxChunks     = 1 << 24
	maxCompressed = 1 << 40
	maxSize       = 1 << 44
	maxTOCSize    = 4096
	// maxMetaRatio bounds how much smaller than itself a chunk table can be
	// stored; real ones reach 4. It keeps a small object from claiming much memory.
	maxMetaRatio = 1000
)

func roundUp(n int64) int64 { return (n + pageSize - 1) &^ (pageSize - 1) }

// An Entry is a RAFS blob table entry (256 bytes, rafs-v6-format 1.5): how one
// blob's chunks are stored. Sizes and offsets are in bytes.
type Entry struct {
	ID                           string // names the stored object, 64 hex digits as a rule
	Index, ChunkSize, ChunkCount uint32
	Codec                        Codec
	Digester                     Digester
	Features                     Features
	CompressedSize               int64 // means different things: use DataEnd
	Size                         int64 // of the cache file, a multiple of 4096
	TOCSize                      uint32
	MetaCodec                    Codec // of the chunk table
	MetaOff, MetaCLen, MetaLen   int64 // of the chunk table, without its header; all 0: ask the TOC
	TOCDigest                    Digest
	MetaBlobDigest               Digest // FeatureSeparate: SHA-256 of the object that holds the chunk table
	MetaBlobSize                 int64  // FeatureSeparate: and its size
	Cipher                       uint32
}

// ParseEntry decodes and validates a blob table entry of 256 bytes. The error is
// errors.ErrUnsupported when the blob needs a feature that we do not have. That
// Index is the entry's position and ChunkSize the superblock's is for the caller
// to check.
func ParseEntry(p []byte) (Entry, error) {
	if len(p) != entrySize {
		return Entry{}, corruptf("blob table entry of %d bytes, want %d", len(p), entrySize)
	}
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	e := Entry{
		ID:             string(bytes.TrimRight(p[:64], "\x00")),
		Index:          u32(p[64:]),
		ChunkSize:      u32(p[68:]),
		ChunkCount:     u32(p[72:]),
		Codec:          Codec(u32(p[76:])),
		Digester:       Digester(u32(p[80:])),
		Features:       Features(u32(p[84:])),
		CompressedSize: int64(u64(p[88:])),
		Size:           int64(u64(p[96:])),
		TOCSize:        u32(p[104:]),
		MetaCodec:      Codec(u32(p[108:])),
		MetaOff:        int64(u64(p[112:])),
		MetaCLen:       int64(u64(p[120:])),
		MetaLen:        int64(u64(p[128:])),
		TOCDigest:      Digest(p[136:168]),
		MetaBlobDigest: Digest(p[168:200]),
		MetaBlobSize:   int64(u64(p[200:])),
		Cipher:         u32(p[216:]),
	}
	if !validID(e.ID) {
		return Entry{}, corruptf("blob table entry has the id %q, want letters, digits, '-', '_' and '.'", e.ID)
	}
	if err := e.validate(); err != nil {
		return Entry{}, fmt.Errorf("blob %s: %w", e.ID, err)
	}
	return e, nil
}

// validID reports whether id is safe as a file name; ids become ones.
func validID(id string) bool {
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return id != "" && id[0] != '.'
}

// validate checks all of e but the id.
func (e Entry) validate() error {
	if name := e.Features.refusal(); name != "" {
		return unsupportedf("it uses %s", name)
	}
	switch {
	case e.Features&featuresFatal != 0:
		return unsupportedf("it uses unknown features %#x", uint32(e.Features&featuresFatal))
	case e.Cipher != 0:
		return unsupportedf("it uses encryption")
	case e.Features&FeatureAligned == 0:
		return unsupportedf("its chunks are not aligned to %d bytes", pageSize)
	case e.Codec > CodecZstd || e.MetaCodec > CodecZstd:
		return unsupportedf("it uses unknown codec %d or %d", uint32(e.Codec), uint32(e.MetaCodec))
	case e.Codec == CodecGzip && e.Features&FeatureChunkInfoV2 == 0:
		return unsupportedf("it is a legacy stargz blob, whose table lacks compressed sizes")
	case e.Digester > SHA256:
		return unsupportedf("it uses unknown digester %d", uint32(e.Digester))
	case e.Features&FeatureBatch != 0 && e.Features&FeatureChunkInfoV2 == 0:
		return corruptf("batches without version 2 chunk entries")
	case e.ChunkSize < pageSize || e.ChunkSize > maxChunkSize || e.ChunkSize&(e.ChunkSize-1) != 0:
		return corruptf("chunk size %d", e.ChunkSize)
	case e.ChunkCount == 0 || e.ChunkCount > maxChunks:
		return corruptf("%d chunks, want 1 to %d", e.ChunkCount, maxChunks)
	case e.Size <= 0 || e.Size > maxSize || e.Size%pageSize != 0:
		return corruptf("size %d, want a multiple of %d up to %d", e.Size, pageSize, int64(maxSize))
	case int64(e.ChunkCount) > e.Size/pageSize:
		return corruptf("%d chunks in %d bytes", e.ChunkCount, e.Size)
	case e.CompressedSize < 0 || e.CompressedSize > maxCompressed:
		return corruptf("compressed size %d", e.CompressedSize)
	case e.TOCSize != 0 && (e.TOCSize < tocEntrySize+tarHeaderSize || e.TOCSize > maxTOCSize || e.TOCSize%tocEntrySize != 0):
		return corruptf("TOC of %d bytes", e.TOCSize)
	case e.MetaBlobSize < 0:
		return corruptf("object with the chunk table of %d bytes", e.MetaBlobSize)
	case e.MetaOff == 0 && e.MetaCLen == 0 && e.MetaLen == 0:
		if e.Features&FeatureTOC == 0 {
			return unsupportedf("it has neither a chunk table nor a TOC")
		}
		return nil
	}
	return e.validateMeta()
}

// validateMeta checks where e says the chunk table is.
func (e Entry) validateMeta() error {
	each := int64(e.chunkEntrySize())
	exact := int64(e.ChunkCount) * each
	switch {
	case e.MetaOff < 0 || e.MetaOff > maxCompressed || e.MetaCLen <= 0 || e.MetaCLen > e.MetaLen ||
		e.MetaCodec == CodecNone && e.MetaCLen != e.MetaLen || e.MetaLen/maxMetaRatio > e.MetaCLen:
		return corruptf("chunk table at %d+%d of %d bytes", e.MetaOff, e.MetaCLen, e.MetaLen)
	case e.MetaLen > maxChunks*(each+batchEntrySize):
		return corruptf("chunk table of %d bytes is too large", e.MetaLen)
	case e.Features&FeatureChunkDict != 0: // counts other chunks than the table has
	case e.Features&FeatureBatch == 0 && e.MetaLen != exact,
		e.Features&FeatureBatch != 0 && (e.MetaLen < exact || e.MetaLen > exact+int64(e.ChunkCount)*batchEntrySize):
		return corruptf("chunk table of %d bytes for %d chunks", e.MetaLen, e.ChunkCount)
	}
	if e.DataEnd() < 0 {
		return corruptf("chunk table at %d leaves no room for chunks", e.MetaOff)
	}
	return nil
}

// Marshal returns the entry as the blob table holds it. An ID of more than 64
// bytes is cut.
func (e Entry) Marshal() [entrySize]byte {
	var p [entrySize]byte
	u32, u64 := binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	copy(p[:64], e.ID)
	u32(p[64:], e.Index)
	u32(p[68:], e.ChunkSize)
	u32(p[72:], e.ChunkCount)
	u32(p[76:], uint32(e.Codec))
	u32(p[80:], uint32(e.Digester))
	u32(p[84:], uint32(e.Features))
	u64(p[88:], uint64(e.CompressedSize))
	u64(p[96:], uint64(e.Size))
	u32(p[104:], e.TOCSize)
	u32(p[108:], uint32(e.MetaCodec))
	u64(p[112:], uint64(e.MetaOff))
	u64(p[120:], uint64(e.MetaCLen))
	u64(p[128:], uint64(e.MetaLen))
	copy(p[136:168], e.TOCDigest[:])
	copy(p[168:200], e.MetaBlobDigest[:])
	u64(p[200:], uint64(e.MetaBlobSize))
	u32(p[216:], e.Cipher)
	return p
}

// DataEnd returns the bound of chunk data in the stored object
// (rafs-v6-format 1.5: CompressedSize is not it). Of an entry whose chunk table
// only the TOC knows it is an upper bound.
func (e Entry) DataEnd() int64 {
	switch {
	case e.Features&FeatureSeparate != 0 || e.Features&FeatureCapTarTOC == 0 || e.MetaLen == 0:
		return e.CompressedSize
	case e.Features&FeatureTarHeader != 0:
		return e.MetaOff - tarHeaderSize
	default:
		return e.MetaOff
	}
}

// chunkEntrySize is the size of an element of the chunk table.
func (e Entry) chunkEntrySize() int {
	if e.Features&FeatureChunkInfoV2 != 0 {
		return 24
	}
	return 16
}
