package erofs

import "encoding/binary"

// A dirent is an entry of a directory: a name and the number of its inode.
type dirent struct {
	name  string
	inode uint32
}

// nextBlock returns how many of d fill the next block and how many bytes they
// take: 12 and the name for each (rafs-v6-format 2.3).
func nextBlock(d []dirent) (n int, size int64) {
	for _, e := range d {
		l := int64(direntSize + len(e.name))
		if size+l > blockSize {
			break
		}
		size += l
		n++
	}
	return n, size
}

// direntsSize returns the i_size of a directory: each block but the last counts
// as full.
func direntsSize(d []dirent) int64 {
	var size int64
	for len(d) > 0 {
		n, used := nextBlock(d)
		if d = d[n:]; len(d) > 0 {
			used = blockSize
		}
		size += used
	}
	return size
}

// emitDirents writes the part [off, end) of directory i's data, off at the start
// of a block.
func (b *writer) emitDirents(out *output, i *winode, off, end int64) {
	d := b.dirents[i.first : i.first+i.count]
	start := out.at
	for pos := int64(0); pos < end; pos += blockSize {
		n, _ := nextBlock(d)
		if pos >= off {
			out.pad(start + pos - off)
			b.emitBlock(out, d[:n])
		}
		d = d[n:]
	}
}

// emitBlock writes a block of entries: all of their heads, then all names. The
// zeros of the padding end the last name where the block is not full.
func (b *writer) emitBlock(out *output, d []dirent) {
	var p [direntSize]byte
	nameOff := direntSize * len(d)
	for _, e := range d {
		child := &b.inodes[e.inode]
		binary.LittleEndian.PutUint64(p[0:], b.l.nid(child.at))
		binary.LittleEndian.PutUint16(p[8:], uint16(nameOff))
		p[10] = fileTypes[child.n.Mode>>12]
		out.write(p[:])
		nameOff += len(e.name)
	}
	for _, e := range d {
		out.writeString(e.name)
	}
}
