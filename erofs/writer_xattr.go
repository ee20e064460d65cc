package erofs

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

const (
	xattrHeaderSize = 12
	xattrEntrySize  = 4
	maxXattrName    = 255 // of Linux, prefix included
	maxXattrValue   = math.MaxUint16
	maxXattrArea    = xattrHeaderSize + 4*(math.MaxUint16-1) // i_xattr_icount has 16 bits
	maxShared       = 255                                    // of one inode
)

// xattrPrefixes are the name prefixes that EROFS numbers (fs/erofs/xattr.h,
// 6.18). RAFS has no others.
var xattrPrefixes = []struct {
	index  uint8
	prefix string
	whole  bool // the prefix is the whole name
}{
	{1, "user.", false},
	{2, "system.posix_acl_access", true},
	{3, "system.posix_acl_default", true},
	{4, "trusted.", false},
	{6, "security.", false},
}

// splitXattr returns the prefix's index and the rest of the name.
func splitXattr(name string) (index uint8, rest string, err error) {
	for _, p := range xattrPrefixes {
		rest, ok := strings.CutPrefix(name, p.prefix)
		if ok && p.whole == (rest == "") {
			return p.index, rest, nil
		}
	}
	return 0, "", errors.New("EROFS has no number for the prefix of this name, only for user., trusted., security. and the POSIX ACLs")
}

func xattrSize(rest string, value []byte) int64 {
	return align(xattrEntrySize+int64(len(rest)+len(value)), 4)
}

// sortedXattrs returns n's attributes by name, without changing n.
func sortedXattrs(n *Node) []Xattr {
	byName := func(x, y Xattr) int { return cmp.Compare(x.Name, y.Name) }
	if slices.IsSortedFunc(n.Xattrs, byName) {
		return n.Xattrs
	}
	return slices.SortedFunc(slices.Values(n.Xattrs), byName)
}

// measureXattrs checks all attributes and finds the size of every inode's area.
func (b *writer) measureXattrs() error {
	if b.o.SharedXattrs {
		b.shared.count = map[xattrKey]int{}
	}
	for id := range b.inodes {
		n := b.inodes[id].n
		if err := checkXattrs(n); err != nil {
			return fmt.Errorf("%s: %w", b.path(uint32(id)), err)
		}
		b.xattrs = b.xattrs || len(n.Xattrs) > 0
		b.shared.add(n)
	}
	b.shared.assign(b.inodes)
	for id := range b.inodes {
		i := &b.inodes[id]
		if len(i.n.Xattrs) == 0 {
			continue
		}
		size := int64(xattrHeaderSize)
		shared, inline := b.shared.split(i.n)
		size += 4 * int64(len(shared))
		for _, x := range inline {
			_, rest, _ := splitXattr(x.Name)
			size += xattrSize(rest, x.Value)
		}
		if size > maxXattrArea {
			return fmt.Errorf("%s: extended attributes take %d bytes: at most %d for one inode", b.path(uint32(id)), size, maxXattrArea)
		}
		i.xattrLen = uint32(size)
	}
	return nil
}

func checkXattrs(n *Node) error {
	sorted := sortedXattrs(n)
	for k, x := range sorted {
		_, rest, err := splitXattr(x.Name)
		switch {
		case err != nil:
		case k > 0 && sorted[k-1].Name == x.Name:
			err = errors.New("is listed twice")
		case len(x.Name) > maxXattrName || strings.ContainsRune(rest, 0):
			err = fmt.Errorf("a name has at most %d bytes and no zero byte", maxXattrName)
		case len(x.Value) > maxXattrValue:
			err = fmt.Errorf("the value has %d bytes: at most %d", len(x.Value), maxXattrValue)
		}
		if err != nil {
			return fmt.Errorf("extended attribute %.300q: %w", x.Name, err)
		}
	}
	return nil
}

// emitXattrs writes the attribute area of an inode (rafs-v6-format 2.2).
func (b *writer) emitXattrs(out *output, i *winode) {
	if i.xattrLen == 0 {
		return
	}
	shared, inline := b.shared.split(i.n)
	var head [xattrHeaderSize]byte // the name filter of 0 promises nothing
	head[4] = byte(len(shared))
	out.write(head[:])
	for _, id := range shared {
		out.write(binary.LittleEndian.AppendUint32(nil, id))
	}
	for _, x := range inline {
		emitXattr(out, x)
	}
}

func emitXattr(out *output, x Xattr) {
	index, rest, _ := splitXattr(x.Name)
	var head [xattrEntrySize]byte
	head[0], head[1] = byte(len(rest)), index
	binary.LittleEndian.PutUint16(head[2:], uint16(len(x.Value)))
	out.write(head[:])
	out.writeString(rest)
	out.write(x.Value)
	out.pad(align(out.at, 4))
}

// sharedXattrs are the attributes that are stored once for several inodes. The
// superblock's xattr_blkaddr stays 0, as nydusd demands, so an attribute's id is
// its offset from the start of the image divided by 4.
type sharedXattrs struct {
	count map[xattrKey]int   // nil: the option is off
	place map[xattrKey]int64 // offset from at
	list  []Xattr            // in the order of place
	at    int64
	size  int64
}

type xattrKey struct{ name, value string }

func keyOf(x Xattr) xattrKey { return xattrKey{x.Name, string(x.Value)} }

func (s *sharedXattrs) add(n *Node) {
	if s.count == nil {
		return
	}
	for _, x := range n.Xattrs {
		s.count[keyOf(x)]++
	}
}

// assign finds the place of every attribute that occurs twice. One that fits a
// block does not cross a block: userspace readers expect that.
func (s *sharedXattrs) assign(inodes []winode) {
	if s.count == nil {
		return
	}
	s.place = map[xattrKey]int64{}
	for _, i := range inodes {
		for _, x := range sortedXattrs(i.n) {
			k := keyOf(x)
			if _, done := s.place[k]; done || s.count[k] < 2 {
				continue
			}
			_, rest, _ := splitXattr(x.Name)
			size := xattrSize(rest, x.Value)
			if size > blockSize-s.size%blockSize {
				s.size = align(s.size, blockSize)
			}
			s.place[k] = s.size
			s.list = append(s.list, x)
			s.size += size
		}
	}
}

// split returns the ids of n's shared attributes and the others. The ids are
// final when the shared area has its place.
func (s *sharedXattrs) split(n *Node) (shared []uint32, inline []Xattr) {
	inline = sortedXattrs(n)
	if len(s.place) == 0 {
		return nil, inline
	}
	all := inline
	inline = nil
	for _, x := range all {
		off, ok := s.place[keyOf(x)]
		if !ok || len(shared) == maxShared {
			inline = append(inline, x)
			continue
		}
		shared = append(shared, uint32((s.at+off)/4))
	}
	return shared, inline
}

func (s *sharedXattrs) emit(out *output) {
	for _, x := range s.list {
		out.pad(s.at + s.place[keyOf(x)])
		emitXattr(out, x)
	}
}
