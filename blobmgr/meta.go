package blobmgr

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/erofsd/erofsd/internal/chunk"
)

// Names of a blob's files beside its cache file, which is called like the blob.
const (
	metaSuffix  = ".meta"
	cleanSuffix = ".clean"
	tmpSuffix   = ".tmp" // after those: not whole yet
)

// The first bytes of these files.
const (
	metaMagic  = "erofsd blob meta 1\n"
	cleanMagic = "erofsd blob clean 1\n"
)

var errForeign = errors.New("not written by this version or damaged")

// marshalMeta returns the content of ID.meta: magic, entry, length of the local
// form of the table, that, which digests are known (a bit each), the known digests,
// and the SHA-256 of all of it. Numbers are little endian.
func marshalMeta(e chunk.Entry, t *chunk.Table) []byte {
	local := t.Marshal()
	known := make([]byte, (t.Len()+7)/8)
	p := make([]byte, 0, len(metaMagic)+256+8+len(local)+len(known)+t.Len()*32+sha256.Size)
	p = append(p, metaMagic...)
	raw := e.Marshal()
	p = append(p, raw[:]...)
	p = binary.LittleEndian.AppendUint64(p, uint64(len(local)))
	p = append(p, local...)
	at := len(p)
	p = append(p, known...)
	for i := range t.Len() {
		if c := t.Chunk(i); c.Known {
			p[at+i/8] |= 1 << (i % 8)
			p = append(p, c.Digest[:]...)
		}
	}
	return seal(p)
}

// seal appends the SHA-256 of p.
func seal(p []byte) []byte {
	sum := sha256.Sum256(p)
	return append(p, sum[:]...)
}

// unseal checks magic and the sum that seal appended and returns what is between.
func unseal(p []byte, magic string) ([]byte, error) {
	n := len(p) - sha256.Size
	if n < len(magic) || string(p[:len(magic)]) != magic {
		return nil, errForeign
	}
	if sum := sha256.Sum256(p[:n]); !bytes.Equal(sum[:], p[n:]) {
		return nil, errForeign
	}
	return p[len(magic):n], nil
}

// metaSum identifies the content of an ID.meta.
func metaSum(p []byte) [32]byte { return [32]byte(p[len(p)-sha256.Size:]) }

// maxMeta bounds the size of ID.meta for a blob like e: a table entry takes at most
// 24 bytes, its batch 40 and its digest 32.
func maxMeta(e chunk.Entry) int64 { return 64<<10 + 2*(e.MetaLen+int64(e.ChunkCount)*104) }

// maxMetaFile bounds an ID.meta of which nothing is known: 1<<24 chunks.
const maxMetaFile = 4 << 30

func parseMeta(p []byte) (chunk.Entry, *chunk.Table, error) {
	p, err := unseal(p, metaMagic)
	if err != nil || len(p) < 256+8 {
		return chunk.Entry{}, nil, errForeign
	}
	e, err := chunk.ParseEntry(p[:256])
	if err != nil {
		return chunk.Entry{}, nil, err
	}
	n := binary.LittleEndian.Uint64(p[256:])
	if p = p[256+8:]; n > uint64(len(p)) {
		return chunk.Entry{}, nil, errForeign
	}
	t, err := chunk.ParseTable(p[:n], e)
	if err != nil {
		return chunk.Entry{}, nil, err
	}
	p = p[n:]
	bits := (t.Len() + 7) / 8
	if len(p) < bits {
		return chunk.Entry{}, nil, errForeign
	}
	known, p := p[:bits], p[bits:]
	for i := range t.Len() {
		if known[i/8]&(1<<(i%8)) == 0 {
			continue
		}
		if len(p) < 32 {
			return chunk.Entry{}, nil, errForeign
		}
		c := t.Chunk(i)
		if _, err := t.SetDigest(i, c.Off, c.Len, chunk.Digest(p[:32])); err != nil {
			return chunk.Entry{}, nil, err
		}
		p = p[32:]
	}
	return e, t, nil
}

// marshalClean returns the content of ID.clean: magic, the sum of the ID.meta that
// the units were verified against, one bit for each unit, and a SHA-256.
func marshalClean(sum [32]byte, present bitmap) []byte {
	p := append([]byte(cleanMagic), sum[:]...)
	for i := range present {
		p = binary.LittleEndian.AppendUint64(p, present[i].Load())
	}
	return seal(p)
}

// parseClean returns the units that were verified and durable; none, and not ok, when
// the mark is missing, damaged or belongs to another ID.meta.
func parseClean(p []byte, sum [32]byte, units int) (clean bitmap, ok bool) {
	clean = newBitmap(units)
	p, err := unseal(p, cleanMagic)
	if err != nil || len(p) != 32+8*len(clean) || !bytes.Equal(p[:32], sum[:]) {
		return clean, false
	}
	for i := range clean {
		clean[i].Store(binary.LittleEndian.Uint64(p[32+8*i:]))
	}
	return clean, true
}

// variant names the cache file for a blob that claims s.Entry.ID but disagrees with
// what is kept under it.
func variant(s Source) string {
	h := sha256.New()
	e := plainEntry(s.Entry)
	raw := e.Marshal()
	h.Write(raw[:])
	h.Write(s.LocalTable)
	for _, d := range s.Digests {
		fmt.Fprintf(h, "\n%d %d %d ", d.Index, d.Off, d.Len)
		h.Write(d.Digest[:])
	}
	return e.ID + "." + hex.EncodeToString(h.Sum(nil)[:8])
}

// plainEntry is e without what says only where an image lists it.
func plainEntry(e chunk.Entry) chunk.Entry {
	e.Index = 0
	return e
}
