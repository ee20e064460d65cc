package chunk

import (
	"encoding/binary"
	"fmt"
)

const (
	metaHeaderSize = 4096
	metaMagic      = 0xb10bb10b
	batchEntrySize = 40
)

// Flags of a version 2 chunk entry (rafs-v6-format 3.3). The CRC is not used: a
// chunk that anybody needs has a digest.
const (
	chunkCompressed = 1
	chunkZran       = 2
	chunkBatch      = 4
	chunkEncrypted  = 8
	chunkHasCRC     = 16
)

// A metaHeader is the 4096 bytes behind the chunk array.
type metaHeader struct {
	features           Features
	codec              Codec
	count              uint32
	off, clen, len     int64
	batchOff, batchLen int64 // of the batch table, inside the array
	batches            uint32
}

func parseMetaHeader(p []byte) (metaHeader, error) {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	if u32(p) != metaMagic || u32(p[4092:]) != metaMagic {
		return metaHeader{}, corruptf("no chunk table here: wrong magic %#x", u32(p))
	}
	return metaHeader{
		features: Features(u32(p[4:])),
		codec:    Codec(u32(p[8:])),
		count:    u32(p[12:]),
		off:      int64(u64(p[16:])),
		clen:     int64(u64(p[24:])),
		len:      int64(u64(p[32:])),
		batchOff: int64(u64(p[40:])),
		batchLen: int64(u64(p[48:])),
		batches:  u32(p[56:]),
	}, nil
}

func (h metaHeader) marshal() []byte {
	p := make([]byte, metaHeaderSize)
	u32, u64 := binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	u32(p, metaMagic)
	u32(p[4:], uint32(h.features))
	u32(p[8:], uint32(h.codec))
	u32(p[12:], h.count)
	u64(p[16:], uint64(h.off))
	u64(p[24:], uint64(h.clen))
	u64(p[32:], uint64(h.len))
	u64(p[40:], uint64(h.batchOff))
	u64(p[48:], uint64(h.batchLen))
	u32(p[56:], h.batches)
	u32(p[4092:], metaMagic)
	return p
}

// check compares h with the entry of its blob.
func (h metaHeader) check(e Entry) error {
	count := e.ChunkCount
	if e.Features&FeatureChunkDict != 0 {
		count = h.count
	}
	if h.count == 0 || h.count != count || h.codec != e.MetaCodec ||
		h.off != e.MetaOff || h.clen != e.MetaCLen || h.len != e.MetaLen ||
		h.features&featuresLayout != e.Features&featuresLayout {
		return corruptf("chunk table of %d chunks at %d+%d of %d bytes (%v, features %#x), the image expects %d at %d+%d of %d bytes (%v, features %#x)",
			h.count, h.off, h.clen, h.len, h.codec, uint32(h.features),
			e.ChunkCount, e.MetaOff, e.MetaCLen, e.MetaLen, e.MetaCodec, uint32(e.Features))
	}
	array := int64(h.count) * int64(e.chunkEntrySize())
	if h.count > maxChunks || array > e.MetaLen {
		return corruptf("chunk table of %d bytes cannot hold %d chunks", e.MetaLen, h.count)
	}
	if e.Features&FeatureBatch != 0 && h.batches > 0 &&
		(h.batchOff != array || h.batches > h.count || int64(h.batches)*batchEntrySize > e.MetaLen-array) {
		return corruptf("%d batches at %d in a chunk table of %d bytes", h.batches, h.batchOff, e.MetaLen)
	}
	return nil
}

// A record is one element of the chunk array, decoded.
type record struct {
	off, len, coff, clen int64
	flags                uint8
	batch, batchOff      uint32
}

func parseRecordV1(p []byte) record {
	a, b := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])
	r := record{
		off:  int64(a & 0xffffffff000),
		len:  int64(a>>44|a&0xf00<<12) + 1,
		coff: int64(b & (1<<40 - 1)),
		clen: int64(b>>44|b>>40&0xf<<20) + 1,
	}
	if r.len != r.clen {
		r.flags = chunkCompressed
	}
	return r
}

func parseRecordV2(p []byte) record {
	a, b, c := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:]), binary.LittleEndian.Uint64(p[16:])
	return record{
		off:   int64(a&0xffffffff) * pageSize,
		len:   int64(a>>32&0xffffff) + 1,
		flags: uint8(a >> 56),
		coff:  int64(b & (1<<40 - 1)),
		clen:  int64(b >> 40),
		batch: uint32(c >> 32), batchOff: uint32(c),
	}
}

// newTable builds the table of e from the plain chunk array and its header. e has
// the place of the chunk table.
func newTable(array, header []byte, e Entry) (*Table, error) {
	h, err := parseMetaHeader(header)
	if err != nil {
		return nil, err
	}
	if err := h.check(e); err != nil {
		return nil, err
	}
	t := &Table{entry: e, chunks: make([]place, 0, h.count), digests: make([]Digest, h.count)}
	parse, each := parseRecordV1, e.chunkEntrySize()
	if e.Features&FeatureChunkInfoV2 != 0 {
		parse = parseRecordV2
	}
	if e.Features&FeatureBatch != 0 {
		t.parseBatches(array[int(h.count)*each:], int(h.batches))
	}
	b := builder{t: t, dataEnd: e.DataEnd(), batch: -1}
	for i := range int(h.count) {
		if err := b.add(parse(array[i*each:])); err != nil {
			return nil, fmt.Errorf("chunk %d: %w", i, err)
		}
	}
	if err := b.endBatch(); err != nil {
		return nil, err
	}
	// A table that a chunk dictionary contributed may hold more than the image uses.
	t.size = b.end
	if t.size != e.Size && (e.Features&FeatureChunkDict == 0 || t.size < e.Size) {
		return nil, corruptf("chunks fill %d bytes of the cache file, the image expects %d", t.size, e.Size)
	}
	return t, nil
}

func (t *Table) parseBatches(p []byte, n int) {
	t.batches = make([]batch, n)
	t.firsts = []uint32{}
	for i := range t.batches {
		t.batches[i] = batch{
			clen:  binary.LittleEndian.Uint32(p[i*batchEntrySize:]),
			plain: binary.LittleEndian.Uint32(p[i*batchEntrySize+4:]),
		}
	}
}

// A builder appends chunks to a table and checks what lookups rely on.
type builder struct {
	t         *Table
	dataEnd   int64
	end       int64 // of the chunks so far in the cache file
	coff      int64 // of the last chunk in the blob
	batch     int   // the batch that is being built, or -1
	batchLen  int64 // its plain bytes so far
	batchPage int64 // where it begins in the cache file
	nextBatch int   // batches appear in order
}

func (b *builder) add(r record) error {
	e := &b.t.entry
	switch {
	case r.off != b.end:
		return corruptf("it lies at %d of the cache file, want %d", r.off, b.end)
	case r.len > int64(e.ChunkSize):
		return corruptf("it has %d bytes, and chunks have at most %d", r.len, e.ChunkSize)
	case r.coff < b.coff:
		return corruptf("it lies at %d of the blob, before its predecessor at %d", r.coff, b.coff)
	case r.flags&^(chunkCompressed|chunkBatch|chunkHasCRC) != 0:
		return unsupportedf("it has flags %#x", r.flags)
	}
	p := place{page: uint32(r.off / pageSize), n: uint32(r.len - 1), c: uint64(r.coff)}
	i := uint32(len(b.t.chunks))
	if r.flags&chunkBatch != 0 {
		if err := b.addToBatch(r, i); err != nil {
			return err
		}
		p.n |= placeBatch
		p.c |= uint64(r.batch) << 40
	} else {
		if err := b.addSingle(r, i); err != nil {
			return err
		}
		p.c |= uint64(r.clen-1) << 40
	}
	if r.flags&chunkCompressed != 0 {
		p.n |= placeCompressed
	}
	b.t.chunks = append(b.t.chunks, p)
	b.end, b.coff = p.end(), r.coff
	return nil
}

func (b *builder) addSingle(r record, i uint32) error {
	if err := b.endBatch(); err != nil {
		return err
	}
	compressed := r.flags&chunkCompressed != 0
	if r.clen < 1 || r.coff+r.clen > b.dataEnd ||
		!compressed && r.clen != r.len || compressed && b.t.entry.Codec == CodecNone {
		return corruptf("it has %d bytes stored as %d at %d, in a blob with %v data up to %d",
			r.len, r.clen, r.coff, b.t.entry.Codec, b.dataEnd)
	}
	if b.t.firsts != nil {
		b.t.firsts = append(b.t.firsts, i)
	}
	return nil
}

func (b *builder) addToBatch(r record, i uint32) error {
	if int(r.batch) >= len(b.t.batches) {
		return corruptf("it is in batch %d of %d", r.batch, len(b.t.batches))
	}
	x := b.t.batches[r.batch]
	if int(r.batch) != b.batch {
		if err := b.endBatch(); err != nil {
			return err
		}
		if int(r.batch) < b.nextBatch || x.clen == 0 || x.clen > maxChunkSize || x.plain > maxChunkSize ||
			r.coff+int64(x.clen) > b.dataEnd || x.clen != x.plain && b.t.entry.Codec == CodecNone {
			return corruptf("batch %d has %d bytes stored as %d at %d, in a blob with %v data up to %d",
				r.batch, x.plain, x.clen, r.coff, b.t.entry.Codec, b.dataEnd)
		}
		b.batch, b.nextBatch = int(r.batch), int(r.batch)+1
		b.batchLen, b.batchPage = 0, r.off
		b.t.firsts = append(b.t.firsts, i)
	} else if r.coff != b.coff {
		return corruptf("batch %d lies at %d and at %d of the blob", r.batch, b.coff, r.coff)
	}
	if int64(r.batchOff) != b.batchLen {
		return corruptf("it lies at %d of batch %d, want %d", r.batchOff, r.batch, b.batchLen)
	}
	b.batchLen += r.len
	if r.off+roundUp(r.len)-b.batchPage > MaxUnitLen {
		return unsupportedf("batch %d takes more than %d bytes of the cache file", r.batch, MaxUnitLen)
	}
	return nil
}

// endBatch checks that the chunks of the open batch are all of it.
func (b *builder) endBatch() error {
	if b.batch >= 0 && b.batchLen != int64(b.t.batches[b.batch].plain) {
		return corruptf("batch %d has %d bytes and chunks of %d", b.batch, b.t.batches[b.batch].plain, b.batchLen)
	}
	b.batch = -1
	return nil
}

// ParseTable reads a chunk table in its local form (rafs-v6-format 3.3): the plain
// array, zeros up to a multiple of 4096, the header. It checks that p belongs to e;
// the digests are not part of it.
func ParseTable(p []byte, e Entry) (*Table, error) {
	t, err := parseLocal(p, e)
	if err != nil {
		return nil, fmt.Errorf("parse chunk table of blob %s: %w", e.ID, err)
	}
	return t, nil
}

func parseLocal(p []byte, e Entry) (*Table, error) {
	if len(p) < metaHeaderSize {
		return nil, corruptf("it has %d bytes", len(p))
	}
	array, header := p[:len(p)-metaHeaderSize], p[len(p)-metaHeaderSize:]
	if e.MetaLen == 0 {
		h, err := parseMetaHeader(header)
		if err != nil {
			return nil, err
		}
		e.MetaCodec, e.MetaOff, e.MetaCLen, e.MetaLen = h.codec, h.off, h.clen, h.len
	}
	if err := e.validate(); err != nil {
		return nil, err
	}
	if e.MetaLen > int64(len(array)) || roundUp(e.MetaLen) != int64(len(array)) {
		return nil, corruptf("it has %d bytes in front of its header, want %d", len(array), roundUp(e.MetaLen))
	}
	return newTable(array[:e.MetaLen], header, e)
}

// Marshal returns the local form of t, which ParseTable reads. CRCs of version 2
// tables are left out.
func (t *Table) Marshal() []byte {
	e := &t.entry
	each := e.chunkEntrySize()
	p := make([]byte, roundUp(e.MetaLen), roundUp(e.MetaLen)+metaHeaderSize)
	put := putRecordV1
	if e.Features&FeatureChunkInfoV2 != 0 {
		put = putRecordV2
	}
	var inBatch uint32
	for i, c := range t.chunks {
		if i > 0 && t.chunks[i-1].batched() && c.batched() && t.chunks[i-1].high() == c.high() {
			inBatch += uint32(t.chunks[i-1].len())
		} else {
			inBatch = 0
		}
		put(p[i*each:], c, inBatch)
	}
	h := metaHeader{
		features: e.Features, codec: e.MetaCodec, count: uint32(len(t.chunks)),
		off: e.MetaOff, clen: e.MetaCLen, len: e.MetaLen,
	}
	if len(t.batches) > 0 {
		array := len(t.chunks) * each
		for i, b := range t.batches {
			binary.LittleEndian.PutUint32(p[array+i*batchEntrySize:], b.clen)
			binary.LittleEndian.PutUint32(p[array+i*batchEntrySize+4:], b.plain)
		}
		h.batchOff, h.batchLen, h.batches = int64(array), int64(len(t.batches)*batchEntrySize), uint32(len(t.batches))
	}
	return append(p, h.marshal()...)
}

func putRecordV1(p []byte, c place, _ uint32) {
	n, cn := uint64(c.len()-1), uint64(c.high())
	binary.LittleEndian.PutUint64(p, n&0xfffff<<44|uint64(c.off())|n>>20<<8)
	binary.LittleEndian.PutUint64(p[8:], cn&0xfffff<<44|cn>>20<<40|uint64(c.coff()))
}

func putRecordV2(p []byte, c place, inBatch uint32) {
	var flags, clen, data uint64
	if c.batched() {
		flags, data = chunkBatch, uint64(c.high())<<32|uint64(inBatch)
	} else {
		clen = uint64(c.high() + 1)
	}
	if c.compressed() {
		flags |= chunkCompressed
	}
	binary.LittleEndian.PutUint64(p, uint64(c.page)|uint64(c.len()-1)<<32|flags<<56)
	binary.LittleEndian.PutUint64(p[8:], uint64(c.coff())|clen<<40)
	binary.LittleEndian.PutUint64(p[16:], data)
}
