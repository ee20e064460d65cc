package erofs

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strings"
)

// What a node may hold; beyond it Linux itself refuses names and links.
const (
	maxNameLen   = 255
	maxTargetLen = 4095
)

// walk numbers the inodes breadth-first and lists every directory's entries.
func (b *writer) walk(root *Node) error {
	if root == nil || root.Mode&typeMask != typeDir {
		return errors.New("the root is not a directory")
	}
	seen := map[*Node]uint32{root: 0}
	b.inodes = append(b.inodes, winode{n: root})
	if err := b.checkNode(root); err != nil {
		return fmt.Errorf("/: %w", err)
	}
	for id := 0; id < len(b.inodes); id++ {
		if b.inodes[id].n.Mode&typeMask == typeDir {
			if err := b.list(uint32(id), seen); err != nil {
				return err
			}
		}
	}
	return nil
}

// list appends the entries of directory id and the inodes that it names first.
func (b *writer) list(id uint32, seen map[*Node]uint32) error {
	dir := b.inodes[id].n
	names := slices.AppendSeq(make([]string, 0, len(dir.Children)+2), maps.Keys(dir.Children))
	for _, name := range names {
		if err := checkName(name); err != nil {
			return fmt.Errorf("%s: %w", b.path(id), err)
		}
	}
	names = append(names, ".", "..")
	slices.Sort(names)
	first := len(b.dirents)
	b.inodes[id].nlink += 2
	for _, name := range names {
		child := id
		switch name {
		case ".":
		case "..":
			child = b.inodes[id].parent
		default:
			var err error
			if child, err = b.adopt(id, dir.Children[name], seen); err != nil {
				return fmt.Errorf("%s: %w", path.Join(b.path(id), name), err)
			}
		}
		b.dirents = append(b.dirents, dirent{name, child})
	}
	b.inodes[id].first, b.inodes[id].count = first, len(names)
	b.inodes[id].size = direntsSize(b.dirents[first:])
	return nil
}

// adopt returns the number of n, a child of directory id, and counts the link.
func (b *writer) adopt(id uint32, n *Node, seen map[*Node]uint32) (uint32, error) {
	if n == nil {
		return 0, errors.New("no node")
	}
	child, known := seen[n]
	dir := n.Mode&typeMask == typeDir
	switch {
	case known && dir:
		return 0, fmt.Errorf("the directory is also %s: a directory has one name", b.path(child))
	case !known:
		if err := b.checkNode(n); err != nil {
			return 0, err
		}
		if len(b.inodes) == math.MaxUint32 {
			return 0, errors.New("too many inodes: at most 4294967295")
		}
		child = uint32(len(b.inodes))
		seen[n] = child
		b.inodes = append(b.inodes, winode{n: n, parent: id, size: leafSize(n)})
	}
	if dir {
		b.inodes[id].nlink++
	} else {
		b.inodes[child].nlink++
	}
	return child, nil
}

// leafSize returns i_size of anything but a directory.
func leafSize(n *Node) int64 {
	switch n.Mode & typeMask {
	case typeReg:
		return n.Size
	case typeLnk:
		return int64(len(n.Target))
	}
	return 0
}

// path names inode i in errors. It searches, so it is for errors only.
func (b *writer) path(i uint32) string {
	var parts []string
	for i != 0 {
		p := &b.inodes[i]
		name := "?"
		for n, c := range b.inodes[p.parent].n.Children {
			if c == p.n && (name == "?" || n < name) { // a hard link: the first name
				name = n
			}
		}
		parts = append(parts, name)
		i = p.parent
	}
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}

func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%q cannot be the name of an entry", name)
	case len(name) > maxNameLen:
		return fmt.Errorf("name %.32q… of %d bytes: at most %d", name, len(name), maxNameLen)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("name %q holds a slash or a zero byte", name)
	}
	return nil
}

// checkNode reports what of n itself cannot be stored. Attributes and chunks
// are checked where they are used.
func (b *writer) checkNode(n *Node) error {
	kind := n.Mode & typeMask
	switch {
	case fileTypes[kind>>12] == 0 || n.Mode > 0xffff:
		return fmt.Errorf("mode %#o is of no known file type", n.Mode)
	case n.Nsec >= 1e9:
		return fmt.Errorf("mtime has %d nanoseconds: at most 999999999", n.Nsec)
	case len(n.Children) > 0 && kind != typeDir:
		return errors.New("has children but is not a directory")
	case len(n.Chunks) > 0 && kind != typeReg:
		return errors.New("has chunks but is not a regular file")
	}
	switch kind {
	case typeReg:
		return b.checkSize(n)
	case typeChr, typeBlk:
		if n.Major >= 1<<12 || n.Minor >= 1<<20 {
			return fmt.Errorf("device %d:%d: at most 12 bits major and 20 bits minor", n.Major, n.Minor)
		}
	case typeLnk:
		if l := len(n.Target); l == 0 || l > maxTargetLen {
			return fmt.Errorf("symlink target of %d bytes: 1 to %d", l, maxTargetLen)
		}
		if strings.ContainsRune(n.Target, 0) {
			return errors.New("symlink target holds a zero byte")
		}
	}
	return nil
}

func (b *writer) checkSize(n *Node) error {
	size := int64(b.o.ChunkSize)
	if n.Size < 0 {
		return fmt.Errorf("size %d is negative", n.Size)
	}
	want := n.Size / size
	if n.Size%size > 0 {
		want++
	}
	if int64(len(n.Chunks)) != want {
		return fmt.Errorf("%d chunks for %d bytes: must be %d of %d bytes", len(n.Chunks), n.Size, want, size)
	}
	return nil
}
