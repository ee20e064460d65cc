package localdisk

import (
	"encoding/binary"
	"encoding/hex"
	"hash/crc32"
	"unicode/utf16"
)

// linuxData is a type of partitions that is not basic data:
// 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as stored.
var linuxData = [16]byte{0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}

// part is a partition to be written.
type part struct {
	kind        [16]byte
	name, guid  string // guid as people write it, without dashes
	first, last int64  // sectors
}

// image is a disk with a table at its start and a copy at its end.
type image struct {
	p       []byte
	sector  int64
	entries int64 // bytes of all entries
}

// newImage makes a disk of so many sectors, with the usual 128 entries.
func newImage(sector, sectors int64, parts ...part) image {
	m := image{make([]byte, sector*sectors), sector, 128 * entrySize}
	le := binary.LittleEndian
	table := make([]byte, m.entries)
	for i, q := range parts {
		e := table[i*entrySize:]
		copy(e, q.kind[:])
		guid, err := hex.DecodeString(q.guid)
		if err != nil || len(guid) != 16 {
			panic("guid " + q.guid)
		}
		le.PutUint32(e[16:], binary.BigEndian.Uint32(guid))
		le.PutUint16(e[20:], binary.BigEndian.Uint16(guid[4:]))
		le.PutUint16(e[22:], binary.BigEndian.Uint16(guid[6:]))
		copy(e[24:32], guid[8:])
		le.PutUint64(e[32:], uint64(q.first))
		le.PutUint64(e[40:], uint64(q.last))
		for j, u := range utf16.Encode([]rune(q.name)) {
			le.PutUint16(e[56+2*j:], u)
		}
	}
	n := m.entries / sector // sectors of entries
	copy(m.p[2*sector:], table)
	copy(m.p[(sectors-1-n)*sector:], table)
	for _, h := range [][3]int64{{1, sectors - 1, 2}, {sectors - 1, 1, sectors - 1 - n}} {
		b := m.head(h[0])
		copy(b, "EFI PART\x00\x00\x01\x00")
		le.PutUint32(b[12:], headerSize)
		le.PutUint64(b[24:], uint64(h[0]))
		le.PutUint64(b[32:], uint64(h[1]))
		le.PutUint64(b[40:], uint64(2+n))
		le.PutUint64(b[48:], uint64(sectors-2-n))
		copy(b[56:], "disk-guid-16byte")
		le.PutUint64(b[72:], uint64(h[2]))
		le.PutUint32(b[80:], 128)
		le.PutUint32(b[84:], entrySize)
		m.seal(h[0])
	}
	// A record that tells older systems to keep off; Linux looks for it.
	copy(m.p[446:], []byte{0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0})
	le.PutUint32(m.p[458:], uint32(sectors-1))
	m.p[510], m.p[511] = 0x55, 0xaa
	return m
}

// head is the header in a sector.
func (m image) head(at int64) []byte { return m.p[at*m.sector:][:m.sector] }

// seal makes the checksums of the header in a sector right.
func (m image) seal(at int64) {
	b, le := m.head(at), binary.LittleEndian
	first := int64(le.Uint64(b[72:])) * m.sector
	n := int64(le.Uint32(b[80:])) * int64(le.Uint32(b[84:]))
	if first >= 0 && first <= int64(len(m.p)) && n >= 0 && n <= int64(len(m.p))-first {
		le.PutUint32(b[88:], crc32.ChecksumIEEE(m.p[first:first+n]))
	}
	length := min(int64(le.Uint32(b[12:])), m.sector)
	clear(b[16:20])
	le.PutUint32(b[16:], crc32.ChecksumIEEE(b[:length]))
}

// blobPart is the partition of the blob with these hex digits, from sector first on.
func blobPart(digits string, first, sectors int64) part {
	return part{linuxData, digits[:32], digits[32:], first, first + sectors - 1}
}
