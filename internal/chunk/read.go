package chunk

import (
	"context"
	"crypto/sha256"
	"fmt"
)

// A ReaderAt is where stored bytes come from; backend.Blob is one.
type ReaderAt interface {
	// ReadAt fills p from offset off or fails.
	ReadAt(ctx context.Context, p []byte, off int64) error
	Size() int64
}

// ReadTable reads the chunk table of e from r, the object that holds it: the blob
// itself or, when e.Features has FeatureSeparate, the one that e.MetaBlobDigest
// names. It takes one read, and a second one for the TOC when e does not say where
// the table is. The digests are not read: they come from the bootstrap through
// SetDigest, or from ReadDigests.
//
// A table from an object that is damaged or of another blob is ErrCorrupt.
func ReadTable(ctx context.Context, r ReaderAt, e Entry) (*Table, error) {
	t, err := readTable(ctx, r, e)
	if err != nil {
		return nil, fmt.Errorf("read chunk table of blob %s: %w", e.ID, err)
	}
	return t, nil
}

func readTable(ctx context.Context, r ReaderAt, e Entry) (*Table, error) {
	if err := e.validate(); err != nil {
		return nil, err
	}
	var meta, header section // known from the TOC only
	if e.MetaLen == 0 {
		var err error
		if meta, header, err = locate(ctx, r, e); err != nil {
			return nil, err
		}
		e.MetaCodec, e.MetaOff, e.MetaCLen, e.MetaLen = meta.codec, meta.off, meta.clen, meta.len
		if err := e.validateMeta(); err != nil {
			return nil, err
		}
	}
	if end := e.MetaOff + e.MetaCLen + metaHeaderSize; end > r.Size() {
		return nil, corruptf("it ends at %d, and the object has %d bytes", end, r.Size())
	}
	p := make([]byte, e.MetaCLen+metaHeaderSize)
	if err := r.ReadAt(ctx, p, e.MetaOff); err != nil {
		return nil, err
	}
	array, head := p[:e.MetaCLen], p[e.MetaCLen:]
	if e.MetaCodec != CodecNone {
		d := NewDecoder()
		defer d.Close()
		array = make([]byte, e.MetaLen)
		if err := d.decompress(e.MetaCodec, array, p[:e.MetaCLen]); err != nil {
			return nil, corruptf("%w", err)
		}
	}
	if meta.name != "" && (sha256.Sum256(array) != meta.digest || sha256.Sum256(head) != header.digest) {
		return nil, corruptf("it is not the one that the TOC names")
	}
	return newTable(array, head, e)
}

// locate finds the chunk table and its header in the TOC.
func locate(ctx context.Context, r ReaderAt, e Entry) (meta, header section, err error) {
	list, err := readTOC(ctx, r, e)
	if err != nil {
		return meta, header, err
	}
	if meta, err = find(list, sectionMeta); err != nil {
		return meta, header, err
	}
	if header, err = find(list, sectionMetaHeader); err != nil {
		return meta, header, err
	}
	if header.off != meta.off+meta.clen || header.clen != metaHeaderSize || header.codec != CodecNone {
		return meta, header, corruptf("header of the chunk table at %d+%d, want %d+%d", header.off, header.clen, meta.off+meta.clen, metaHeaderSize)
	}
	return meta, header, nil
}

// ReadDigests reads the digests that the object r keeps of e's chunks, in their
// order, in two reads; r is as in ReadTable. They are worth as much as what vouches
// for them: when e.TOCSize is not zero, e's TOCDigest covers them; without it they
// are only what the object claims, and nothing to verify chunks with.
func ReadDigests(ctx context.Context, r ReaderAt, e Entry) ([]Digest, error) {
	d, err := readDigests(ctx, r, e)
	if err != nil {
		return nil, fmt.Errorf("read digests of blob %s: %w", e.ID, err)
	}
	return d, nil
}

func readDigests(ctx context.Context, r ReaderAt, e Entry) ([]Digest, error) {
	if err := e.validate(); err != nil {
		return nil, err
	}
	if want := FeatureTOC | FeatureInlinedChunkDigest; e.Features&want != want {
		return nil, unsupportedf("it has none")
	}
	list, err := readTOC(ctx, r, e)
	if err != nil {
		return nil, err
	}
	s, err := find(list, sectionDigest)
	if err != nil {
		return nil, err
	}
	if s.codec != CodecNone || s.clen != s.len || s.len != int64(e.ChunkCount)*int64(len(Digest{})) {
		return nil, corruptf("%d bytes stored as %d (%v) for %d chunks", s.len, s.clen, s.codec, e.ChunkCount)
	}
	p := make([]byte, s.clen)
	if err := r.ReadAt(ctx, p, s.off); err != nil {
		return nil, err
	}
	if sha256.Sum256(p) != s.digest {
		return nil, corruptf("they are not those that the TOC names")
	}
	out := make([]Digest, e.ChunkCount)
	for i := range out {
		out[i] = Digest(p[i*len(Digest{}):])
	}
	return out, nil
}
