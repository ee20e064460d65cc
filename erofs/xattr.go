package erofs

import (
	"bytes"
	"fmt"
)

// Xattrs returns the extended attributes of n in their order on disk, shared
// ones first (rafs-v6-format 2.2).
func (m *Image) Xattrs(n Inode) ([]Xattr, error) {
	list, err := m.readXattrs(n)
	if err != nil {
		return nil, fmt.Errorf("inode %d: attributes: %w", n.NID, err)
	}
	return list, nil
}

func (m *Image) readXattrs(n Inode) ([]Xattr, error) {
	shared, inline, err := m.xattrArea(n)
	if err != nil {
		return nil, err
	}
	var list []Xattr
	for i, id := range shared {
		x, err := m.sharedXattr(id)
		if err != nil {
			return nil, fmt.Errorf("shared one %d: %w", i, err)
		}
		list = append(list, x)
	}
	for len(inline) > 0 {
		x, size, err := parseXattr(inline)
		if err != nil {
			return nil, err
		}
		list = append(list, x)
		inline = inline[size:]
	}
	return list, nil
}

// xattrArea returns the numbers of the shared attributes and the bytes of the
// others.
func (m *Image) xattrArea(n Inode) (shared []uint32, inline []byte, err error) {
	if n.xattrLen == 0 {
		return nil, nil, nil
	}
	area, err := m.pages.read(n.off+n.headLen, n.xattrLen)
	if err != nil {
		return nil, nil, err
	}
	count := int(area[4])
	area = area[xattrHeaderSize:]
	if 4*count > len(area) {
		return nil, nil, bad("%d shared ones in %d bytes", count, len(area))
	}
	for range count {
		shared = append(shared, le.Uint32(area))
		area = area[4:]
	}
	return shared, area, nil
}

// sharedXattr reads the shared attribute with the given number, which counts
// units of 4 bytes.
func (m *Image) sharedXattr(id uint32) (Xattr, error) {
	off := int64(m.sb.XattrBlkaddr)<<m.sb.BlockBits + int64(id)*4
	head, err := m.pages.read(off, xattrEntrySize)
	if err != nil {
		return Xattr{}, err
	}
	p, err := m.pages.read(off, xattrEntrySize+int64(head[0])+int64(le.Uint16(head[2:])))
	if err != nil {
		return Xattr{}, err
	}
	x, _, err := parseXattr(p)
	return x, err
}

// parseXattr parses the entry at the start of p and returns its size with the
// padding that there is.
func parseXattr(p []byte) (Xattr, int, error) {
	if len(p) < xattrEntrySize {
		return Xattr{}, 0, bad("entry in %d bytes", len(p))
	}
	name := xattrEntrySize + int(p[0])
	end := name + int(le.Uint16(p[2:]))
	if end > len(p) {
		return Xattr{}, 0, bad("entry of %d bytes in %d", end, len(p))
	}
	prefix, err := xattrPrefix(p[1], p[xattrEntrySize:name])
	if err != nil {
		return Xattr{}, 0, err
	}
	x := Xattr{prefix + string(p[xattrEntrySize:name]), bytes.Clone(p[name:end])}
	return x, min(int(align(int64(end), 4)), len(p)), nil
}

// xattrPrefix returns the prefix with number index, for a name that goes on
// with rest.
func xattrPrefix(index uint8, rest []byte) (string, error) {
	for _, p := range xattrPrefixes {
		if p.index != index {
			continue
		}
		if p.whole != (len(rest) == 0) || len(p.prefix)+len(rest) > maxXattrName || bytes.IndexByte(rest, 0) >= 0 {
			return "", bad("name %s%.80q", p.prefix, rest)
		}
		return p.prefix, nil
	}
	return "", unsupported("name prefix %d", index)
}
