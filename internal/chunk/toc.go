package chunk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strconv"
)

const (
	tocEntrySize  = 128
	tarHeaderSize = 512
)

// Names of the sections of a blob (rafs-v6-format 3.2).
const (
	sectionData       = "image.blob"
	sectionMeta       = "blob.meta"
	sectionMetaHeader = "blob.meta.header"
	sectionDigest     = "blob.digest"
	sectionTOC        = "rafs.blob.toc"
)

// tocCodecs are the flags of a TOC entry; gzip has none.
var tocCodecs = map[uint32]Codec{1: CodecNone, 2: CodecZstd, 4: CodecLZ4}

// A section is an entry of the TOC.
type section struct {
	name           string
	codec          Codec
	digest         Digest // SHA-256 of the plain content
	off, clen, len int64
}

// parseTOC decodes the TOC at the end of p, which ends with the object: entries
// and their tar header. size is the object's. It returns the bytes that the TOC's
// digest covers as well.
func parseTOC(p []byte, size int64) ([]section, []byte, error) {
	if len(p) < tarHeaderSize {
		return nil, nil, corruptf("object of %d bytes has no TOC", len(p))
	}
	body, header := p[:len(p)-tarHeaderSize], p[len(p)-tarHeaderSize:]
	name, n, ok := parseTarHeader(header)
	if !ok || name != sectionTOC {
		return nil, nil, corruptf("object does not end with a TOC")
	}
	if n <= 0 || n > int64(len(body)) || n%tocEntrySize != 0 {
		return nil, nil, corruptf("TOC of %d bytes", n)
	}
	raw := p[int64(len(body))-n:]
	var list []section
	for e := raw; len(e) > tarHeaderSize; e = e[tocEntrySize:] {
		u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
		c, ok := tocCodecs[u32(e)&0xf]
		s := section{
			name:   string(bytes.TrimRight(e[8:24], "\x00")),
			codec:  c,
			digest: Digest(e[24:56]),
			off:    int64(u64(e[56:])),
			clen:   int64(u64(e[64:])),
			len:    int64(u64(e[72:])),
		}
		if !ok || s.off < 0 || s.clen < 0 || s.off > size || s.clen > size-s.off || s.len < 0 || s.len > maxSize {
			return nil, nil, corruptf("section %q of the TOC: flags %#x, %d+%d of %d bytes", s.name, u32(e), s.off, s.clen, s.len)
		}
		list = append(list, s)
	}
	return list, raw, nil
}

func (s section) marshal() []byte {
	p := make([]byte, tocEntrySize)
	u64 := binary.LittleEndian.PutUint64
	for flag, c := range tocCodecs {
		if c == s.codec {
			binary.LittleEndian.PutUint32(p, flag)
		}
	}
	copy(p[8:24], s.name)
	copy(p[24:56], s.digest[:])
	u64(p[56:], uint64(s.off))
	u64(p[64:], uint64(s.clen))
	u64(p[72:], uint64(s.len))
	return p
}

// parseTarHeader decodes the header that nydus puts behind each section.
func parseTarHeader(p []byte) (name string, size int64, ok bool) {
	sum, err := strconv.ParseUint(string(bytes.Trim(p[148:156], " \x00")), 8, 32)
	if err != nil || string(p[257:262]) != "ustar" || uint32(sum) != tarSum(p) {
		return "", 0, false
	}
	n, err := strconv.ParseUint(string(bytes.Trim(p[124:136], " \x00")), 8, 62)
	if err != nil {
		return "", 0, false
	}
	return string(bytes.TrimRight(p[:100], "\x00")), int64(n), true
}

// tarHeader returns the header that follows a section (rafs-v6-format 3.1): GNU
// style, nothing but name, size, type and checksum.
func tarHeader(name string, size int64) []byte {
	p := make([]byte, tarHeaderSize)
	copy(p, name)
	if octal := fmt.Sprintf("%011o", size); len(octal) == 11 {
		copy(p[124:], octal)
	} else { // base 256
		binary.BigEndian.PutUint64(p[128:136], uint64(size))
		p[124] = 0x80
	}
	p[156] = '0'
	copy(p[257:], "ustar  \x00")
	copy(p[148:], fmt.Sprintf("%07o\x00", tarSum(p)))
	return p
}

// tarSum adds all bytes of a header, its own field counting as blanks.
func tarSum(p []byte) uint32 {
	sum := uint32(8 * ' ')
	for i, b := range p {
		if i < 148 || i >= 156 {
			sum += uint32(b)
		}
	}
	return sum
}

// readTOC reads the TOC at the end of r, in one read, and compares it with the
// digest that e has when it has one.
func readTOC(ctx context.Context, r ReaderAt, e Entry) ([]section, error) {
	n := min(r.Size(), maxTOCSize)
	if e.TOCSize != 0 {
		n = min(r.Size(), int64(e.TOCSize))
	}
	p := make([]byte, n)
	if err := r.ReadAt(ctx, p, r.Size()-n); err != nil {
		return nil, fmt.Errorf("read TOC: %w", err)
	}
	list, raw, err := parseTOC(p, r.Size())
	if err != nil {
		return nil, err
	}
	// Without a size the digest is one that the snapshotter's converter computed
	// otherwise (rafs-v6-format 3.2).
	if e.TOCSize != 0 && (uint32(len(raw)) != e.TOCSize || Digest(sha256.Sum256(raw)) != e.TOCDigest) {
		return nil, corruptf("TOC is not the one that the image names")
	}
	return list, nil
}

// find returns the section called name.
func find(list []section, name string) (section, error) {
	for _, s := range list {
		if s.name == name {
			return s, nil
		}
	}
	return section{}, corruptf("TOC has no section %s", name)
}
