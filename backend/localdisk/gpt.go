package localdisk

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"slices"
	"unicode/utf16"
)

// Sizes in the table, in bytes.
const (
	headerSize = 92  // of a header, at least
	entrySize  = 128 // of an entry, at least
	maxEntries = 1 << 20
	nameOff    = 56 // of the name in an entry
	nameLen    = 32 // hex digits of a blob's digest in a name
)

// basicData is the type of the partitions of older tables, as stored:
// EBD0A0A2-B9E5-4433-87C0-68B6B72699C7.
var basicData = [16]byte{0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7}

// A partition is an entry of the table that is in use.
type partition struct {
	Extent
	name  string
	guid  string // 32 hex digits, in the order in which people write them
	basic bool   // its type is basic data
}

// A table holds the partitions in the order of their offsets.
type table []partition

// find returns the partition of the blob whose digest has these hex digits.
func (t table) find(hex string) (partition, error) {
	var found []partition
	for _, p := range t {
		if len(p.name) != nameLen || len(hex) <= nameLen {
			continue
		}
		if p.name == hex[:nameLen] && (p.basic || p.guid == hex[nameLen:]) {
			found = append(found, p)
		}
	}
	switch len(found) {
	case 0:
		return partition{}, fmt.Errorf("none of its %d partitions is for it: %w", len(t), fs.ErrNotExist)
	case 1:
		return found[0], nil
	}
	return partition{}, fmt.Errorf("%d of its partitions are for it, at %d and at %d", len(found), found[0].Off, found[1].Off)
}

// readTable reads the table of the disk r of size bytes: the one at its start or, when
// that is damaged, the copy at its end.
func readTable(r io.ReaderAt, size int64) (table, error) {
	var damaged error
	for _, sector := range []int64{512, 4096} {
		last := size/sector - 1
		t, alternate, err := readTableAt(r, size, sector, 1)
		if err == nil {
			return t, nil
		}
		if err != errNoTable {
			damaged = cmp.Or(damaged, err)
		}
		// The copy is where the header says, if that much of it is right, or at the
		// end of the disk.
		for _, at := range []int64{alternate, last} {
			if at <= 1 {
				continue
			}
			if t, _, err := readTableAt(r, size, sector, at); err == nil {
				return t, nil
			}
		}
	}
	if damaged != nil {
		return nil, fmt.Errorf("its partition table is damaged, and so is the copy at its end: %w", damaged)
	}
	return nil, errNoTable
}

var errNoTable = errors.New("it has no GUID partition table")

// readTableAt reads the table whose header is in the given sector. alternate is where
// its copy is, 0 when that is not known.
func readTableAt(r io.ReaderAt, size, sector, at int64) (t table, alternate int64, err error) {
	head := make([]byte, sector)
	if at < 1 || at >= size/sector {
		return nil, 0, errNoTable
	}
	if _, err := r.ReadAt(head, at*sector); err != nil {
		return nil, 0, err
	}
	if !bytes.HasPrefix(head, []byte("EFI PART")) {
		return nil, 0, errNoTable
	}
	le := binary.LittleEndian
	length := le.Uint32(head[12:])
	if length < headerSize || int64(length) > sector {
		return nil, 0, fmt.Errorf("its header in sector %d has %d bytes", at, length)
	}
	sum := le.Uint32(head[16:])
	clear(head[16:20])
	if crc32.ChecksumIEEE(head[:length]) != sum {
		return nil, 0, fmt.Errorf("the checksum of its header in sector %d is wrong", at)
	}
	if self := le.Uint64(head[24:]); self != uint64(at) {
		return nil, 0, fmt.Errorf("its header in sector %d is one for sector %d", at, self)
	}
	if a := le.Uint64(head[32:]); a < uint64(size/sector) {
		alternate = int64(a)
	}
	entries, each, err := readEntries(r, size, sector, head)
	if err != nil {
		return nil, alternate, err
	}
	t, err = parseEntries(entries, each, size, sector)
	return t, alternate, err
}

// readEntries reads what the header head says: entries of each bytes.
func readEntries(r io.ReaderAt, size, sector int64, head []byte) (entries []byte, each int, err error) {
	le := binary.LittleEndian
	first, number, length := le.Uint64(head[72:]), le.Uint32(head[80:]), le.Uint32(head[84:])
	if length < entrySize || length%entrySize != 0 || uint64(length)*uint64(number) > maxEntries {
		return nil, 0, fmt.Errorf("it has %d entries of %d bytes", number, length)
	}
	total := int64(length) * int64(number)
	if first < 2 || first >= uint64(size/sector) || int64(first)*sector > size-total {
		return nil, 0, fmt.Errorf("its entries in sector %d reach past the disk", first)
	}
	entries = make([]byte, total)
	if _, err := r.ReadAt(entries, int64(first)*sector); err != nil && !(err == io.EOF && total == 0) {
		return nil, 0, err
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(head[88:]) {
		return nil, 0, errors.New("the checksum of its entries is wrong")
	}
	return entries, int(length), nil
}

// parseEntries returns the partitions in entries of each bytes.
func parseEntries(entries []byte, each int, size, sector int64) (table, error) {
	var t table
	le := binary.LittleEndian
	for e := range slices.Chunk(entries, each) {
		if [16]byte(e) == [16]byte{} {
			continue // not in use
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if first < 1 || last < first || last >= uint64(size/sector) {
			return nil, fmt.Errorf("it has a partition from sector %d to %d of %d", first, last, size/sector)
		}
		t = append(t, partition{
			Extent: Extent{int64(first) * sector, int64(last-first+1) * sector},
			name:   nameOf(e[nameOff:entrySize]), guid: guidOf([16]byte(e[16:])), basic: [16]byte(e) == basicData,
		})
	}
	slices.SortFunc(t, func(a, b partition) int { return cmp.Compare(a.Off, b.Off) })
	for i := 1; i < len(t); i++ {
		if before := t[i-1]; before.Off+before.Size > t[i].Off {
			return nil, fmt.Errorf("its partitions %.40q and %.40q overlap", before.name, t[i].name)
		}
	}
	return t, nil
}

// nameOf decodes UTF-16 up to a zero.
func nameOf(p []byte) string {
	var units []uint16
	for ; len(p) >= 2; p = p[2:] {
		u := binary.LittleEndian.Uint16(p)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

// guidOf returns the digits of a GUID, of which the first three fields are stored with
// their last byte first.
func guidOf(g [16]byte) string {
	slices.Reverse(g[0:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
	return hex.EncodeToString(g[:])
}
