package chunk

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
)

// A Tail says what the chunk data of a finished blob is.
type Tail struct {
	Chunks     []Chunk   // in order, as they lie in the blob; all with digests
	DataLen    int64     // bytes of chunk data that were written
	DataDigest hash.Hash // SHA-256 that has seen them; WriteTail writes to it
	Codec      Codec     // of the chunks, not gzip
	Digester   Digester
	ChunkSize  uint32
}

// WriteTail writes to w what follows the chunk data of a blob (rafs-v6-format 3.1,
// row "blob-toc"): chunk table, digests and TOC. It returns the entry of the blob
// without ID and Index. What ReadTable would refuse is refused here.
func WriteTail(w io.Writer, t Tail) (Entry, error) {
	e, err := writeTail(w, t)
	if err != nil {
		return Entry{}, fmt.Errorf("write chunk table: %w", err)
	}
	return e, nil
}

func writeTail(w io.Writer, t Tail) (Entry, error) {
	array, digests, size, err := marshalChunks(t.Chunks)
	if err != nil {
		return Entry{}, err
	}
	stored, codec, err := compressMeta(array, t.Codec)
	if err != nil {
		return Entry{}, err
	}
	e := Entry{
		ChunkSize: t.ChunkSize, ChunkCount: uint32(len(t.Chunks)),
		Codec: t.Codec, Digester: t.Digester, Features: featuresWritten, Size: size,
		MetaCodec: codec, MetaOff: t.DataLen + tarHeaderSize, MetaCLen: int64(len(stored)), MetaLen: int64(len(array)),
	}
	if err := e.validate(); err != nil {
		return Entry{}, err
	}
	header := metaHeader{
		features: e.Features, codec: codec, count: e.ChunkCount,
		off: e.MetaOff, clen: e.MetaCLen, len: e.MetaLen,
	}.marshal()
	if _, err := newTable(array, header, e); err != nil {
		return Entry{}, err
	}

	x := tailWriter{w: w, off: t.DataLen}
	// The digest of the data is the only one that covers the tar header too.
	dataHeader := tarHeader(sectionData, t.DataLen)
	t.DataDigest.Write(dataHeader)
	x.toc = append(x.toc, section{name: sectionData, digest: Digest(t.DataDigest.Sum(nil)), clen: t.DataLen, len: size})
	x.write(dataHeader)
	x.section(sectionMeta, codec, stored, array)
	x.section(sectionMetaHeader, CodecNone, header, header)
	x.write(tarHeader(sectionMeta, e.MetaCLen+metaHeaderSize))
	x.section(sectionDigest, CodecNone, digests, digests)
	x.write(tarHeader(sectionDigest, int64(len(digests))))

	var toc []byte
	for _, s := range x.toc {
		toc = append(toc, s.marshal()...)
	}
	toc = append(toc, tarHeader(sectionTOC, int64(len(toc)))...)
	x.write(toc)
	e.TOCSize, e.TOCDigest = uint32(len(toc)), sha256.Sum256(toc)
	e.CompressedSize = x.off
	return e, x.err
}

// marshalChunks returns the version 1 chunk array, the digests, and the size of the
// cache file.
func marshalChunks(chunks []Chunk) (array, digests []byte, size int64, err error) {
	array, digests = make([]byte, 16*len(chunks)), make([]byte, 0, len(Digest{})*len(chunks))
	for i, c := range chunks {
		if c.Off%pageSize != 0 || c.Off < 0 || c.Off >= maxSize || c.COff < 0 || c.COff >= maxCompressed ||
			c.Len < 1 || c.Len > maxChunkSize || c.CLen < 1 || c.CLen > maxChunkSize ||
			c.Compressed != (c.CLen < c.Len) || !c.Compressed && c.CLen != c.Len || !c.Known || c.Digest == (Digest{}) {
			return nil, nil, 0, fmt.Errorf("chunk %d: internal error: %+v cannot be stored", i, c)
		}
		p := place{page: uint32(c.Off / pageSize), n: uint32(c.Len - 1), c: uint64(c.COff) | uint64(c.CLen-1)<<40}
		putRecordV1(array[16*i:], p, 0)
		digests = append(digests, c.Digest[:]...)
		size = p.end()
	}
	return array, digests, size, nil
}

// compressMeta compresses the chunk array of a blob with codec c. That is zstd
// unless the blob has no compression at all: readers cannot extract LZ4 sections.
func compressMeta(array []byte, c Codec) ([]byte, Codec, error) {
	if c == CodecNone {
		return array, CodecNone, nil
	}
	e, err := NewEncoder(CodecZstd, 0)
	if err != nil {
		return nil, CodecNone, err
	}
	defer e.Close()
	if out, ok := e.Encode(nil, array); ok {
		return out, CodecZstd, nil
	}
	return array, CodecNone, nil
}

// A tailWriter writes sections and keeps the first error.
type tailWriter struct {
	w   io.Writer
	off int64
	toc []section
	err error
}

func (x *tailWriter) section(name string, c Codec, stored, plain []byte) {
	x.toc = append(x.toc, section{
		name: name, codec: c, digest: sha256.Sum256(plain),
		off: x.off, clen: int64(len(stored)), len: int64(len(plain)),
	})
	x.write(stored)
}

func (x *tailWriter) write(p []byte) {
	if x.err == nil {
		_, x.err = x.w.Write(p)
	}
	x.off += int64(len(p))
}
