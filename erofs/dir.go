package erofs

import (
	"bytes"
	"fmt"
	"io/fs"
	"iter"
	"strings"
)

// A Dirent is a name in a directory.
type Dirent struct {
	Name string // "." and ".." included
	NID  uint64
	Type uint8 // 1 file, 2 directory, 3 character, 4 block device, 5 fifo, 6 socket, 7 symbolic link
}

// ReadDir returns the entries of directory n in their order on disk, "." and
// ".." among them (rafs-v6-format 2.3). It checks every offset and name; that the
// names are sorted is for [Check] to see.
func (m *Image) ReadDir(n Inode) iter.Seq2[Dirent, error] {
	return func(yield func(Dirent, error) bool) {
		if err := m.readDir(n, yield); err != nil {
			yield(Dirent{}, fmt.Errorf("inode %d: directory: %w", n.NID, err))
		}
	}
}

// readDir returns an error that yield has not seen.
func (m *Image) readDir(n Inode, yield func(Dirent, error) bool) error {
	if !n.IsDir() {
		return bad("mode %o is none", n.Mode)
	}
	for off := int64(0); off < n.Size; off += m.sb.BlockSize() {
		p, err := m.flatBlock(n, off)
		if err != nil {
			return err
		}
		more, err := readDirBlock(p, yield)
		if err != nil {
			return fmt.Errorf("block at %d: %w", off, err)
		}
		if !more {
			return nil
		}
	}
	return nil
}

// readDirBlock yields the entries of one block and reports whether yield wants
// more. Name i ends where name i+1 begins, the last one at a NUL or with p.
func readDirBlock(p []byte, yield func(Dirent, error) bool) (more bool, err error) {
	if len(p) < direntSize {
		return false, bad("%d bytes are too few for an entry", len(p))
	}
	first := int(le.Uint16(p[8:]))
	if first < direntSize || first >= len(p) || first%direntSize != 0 {
		return false, bad("first name at %d of %d bytes", first, len(p))
	}
	count := first / direntSize
	for i := range count {
		e := p[i*direntSize:]
		start, end := int(le.Uint16(e[8:])), len(p)
		if i+1 < count {
			end = int(le.Uint16(e[direntSize+8:]))
		}
		if start < first || start >= end || end > len(p) {
			return false, bad("entry %d: name from %d to %d of %d bytes", i, start, end, len(p))
		}
		name := p[start:end]
		if i+1 == count {
			if nul := bytes.IndexByte(name, 0); nul >= 0 {
				name = name[:nul]
			}
		}
		switch {
		case len(name) == 0 || len(name) > maxName:
			return false, bad("entry %d: name of %d bytes: must have 1 to %d", i, len(name), maxName)
		case bytes.IndexByte(name, 0) >= 0 || bytes.IndexByte(name, '/') >= 0:
			return false, bad("entry %d: name %.80q contains a NUL or slash", i, name)
		}
		if !yield(Dirent{string(name), le.Uint64(e), e[10]}, nil) {
			return false, nil
		}
	}
	return true, nil
}

// Lookup returns the inode of a slash-separated path below the root; empty and
// "." elements are skipped, symbolic links not followed. The error is
// [fs.ErrNotExist] when a name does not exist.
func (m *Image) Lookup(path string) (Inode, error) {
	n, err := m.Inode(m.Root())
	if err != nil {
		return Inode{}, err
	}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." {
			continue
		}
		if n, err = m.child(n, name); err != nil {
			return Inode{}, fmt.Errorf("look up %s: %w", path, err)
		}
	}
	return n, nil
}

func (m *Image) child(dir Inode, name string) (Inode, error) {
	if !dir.IsDir() {
		return Inode{}, fs.ErrNotExist
	}
	for e, err := range m.ReadDir(dir) {
		if err != nil {
			return Inode{}, err
		}
		if e.Name == name {
			return m.Inode(e.NID)
		}
	}
	return Inode{}, fs.ErrNotExist
}
