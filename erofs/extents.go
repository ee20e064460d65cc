package erofs

import (
	"fmt"
	"iter"
)

// Hole is the Device of an [Extent] that is not stored and reads as zeros.
const Hole = -1

// An Extent is a run of a regular file's data.
type Extent struct {
	FileOff, Len int64  // bytes
	Device       int    // 0 the image itself, i+1 Devices()[i], or [Hole]
	Off          int64  // in the device, bytes
	Chunk        uint32 // RAFS: index of the chunk in its blob
}

// Extents returns where the data of the regular file n lie, in file order and
// without gaps. Every extent is inside its device, with the block that its end
// lies in. RAFS files have one extent for each chunk, of the image's chunk size
// whatever the kernel's is; that the kernel sees the same bytes is checked
// (rafs-v6-format 2.4).
func (m *Image) Extents(n Inode) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if err := m.extents(n, yield); err != nil {
			yield(Extent{}, fmt.Errorf("inode %d: data: %w", n.NID, err))
		}
	}
}

// extents returns an error that yield has not seen.
func (m *Image) extents(n Inode, yield func(Extent, error) bool) error {
	switch {
	case !n.IsRegular():
		return bad("mode %o is no regular file", n.Mode)
	case m.rafs != nil && n.Layout != Chunks:
		return bad("%s data in a RAFS image: must be chunk-based", n.Layout)
	case n.Layout == Chunks:
		f, err := m.chunkFormat(n)
		if err != nil {
			return err
		}
		return m.chunkExtents(n, f, yield)
	}
	return m.flatExtents(n, yield)
}

func (m *Image) flatExtents(n Inode, yield func(Extent, error) bool) error {
	at, end, err := m.flat(n)
	if err != nil {
		return err
	}
	if end > 0 {
		e, err := m.locate(Extent{Len: end, Off: at})
		if err != nil || !yield(e, nil) {
			return err
		}
	}
	if end < n.Size {
		if n.tail()+n.Size-end > m.pages.size {
			return bad("inline data end behind the image")
		}
		yield(Extent{FileOff: end, Len: n.Size - end, Off: n.tail()}, nil)
	}
	return nil
}

// A chunkFormat is how the index of a chunk-based inode is read.
type chunkFormat struct {
	size   int64 // bytes of a chunk, as the index counts them
	kernel int64 // as the kernel counts them
	at     int64 // of the index in the image
	count  int64 // entries
	width  int64 // bytes of an entry
}

func (m *Image) chunkFormat(n Inode) (chunkFormat, error) {
	if n.union&^chunkFormatKnown != 0 {
		return chunkFormat{}, unsupported("chunk format 0x%x", n.union)
	}
	shift := n.union&chunkBitsMask + uint32(m.sb.BlockBits)
	f := chunkFormat{kernel: 1 << shift, width: 4}
	f.size = f.kernel
	if n.union&chunkHasIndexes != 0 {
		f.width = indexSize
	}
	if m.rafs != nil {
		f.size = int64(m.rafs.ChunkSize)
		if f.width != indexSize {
			return f, bad("chunk format 0x%x: RAFS has 8-byte indexes", n.union)
		}
		// The kernel steps through the index with its own chunk size.
		if n.Size > 0 && f.kernel != f.size && (f.kernel < f.size || f.kernel < n.Size) {
			return f, bad("the kernel would read it in chunks of %d bytes, its index has one for every %d", f.kernel, f.size)
		}
	}
	f.at = align(n.tail(), f.width)
	f.count = n.Size / f.size
	if n.Size%f.size != 0 {
		f.count++
	}
	if f.at > m.pages.size || f.count > (m.pages.size-f.at)/f.width {
		return f, bad("%d chunks for %d bytes: their index ends behind the image", f.count, n.Size)
	}
	return f, nil
}

func (m *Image) chunkExtents(n Inode, f chunkFormat, yield func(Extent, error) bool) error {
	const some = 1024 // entries a read
	var first Extent
	for i := int64(0); i < f.count; i += some {
		p, err := m.pages.read(f.at+i*f.width, min(some, f.count-i)*f.width)
		if err != nil {
			return err
		}
		for k := i; len(p) > 0; k, p = k+1, p[f.width:] {
			e := Extent{FileOff: k * f.size, Len: min(f.size, n.Size-k*f.size)}
			if err := m.index(p[:f.width], &e); err != nil {
				return fmt.Errorf("chunk %d: %w", k, err)
			}
			if k == 0 {
				first = e
			} else if f.kernel > f.size && (e.Device != first.Device || e.Off != first.Off+e.FileOff) {
				return bad("chunk %d: is at %d of device %d, where the kernel does not look for it", k, e.Off, e.Device)
			}
			if !yield(e, nil) {
				return nil
			}
		}
	}
	return nil
}

// index fills in where the chunk lies whose index entry is p.
func (m *Image) index(p []byte, e *Extent) (err error) {
	block, device := le.Uint32(p), 0
	if len(p) == indexSize {
		block, device = le.Uint32(p[4:]), int(le.Uint16(p[2:]))
		high := le.Uint16(p)
		if m.rafs != nil { // bytes 0, 1 and 3 are the chunk's number; the kernel ignores them
			e.Chunk = uint32(high) | uint32(p[3])<<16
			device, high = int(p[2]), 0
		}
		if high != 0 && block != nullBlock {
			return unsupported("block number beyond 32 bits")
		}
	}
	switch {
	case m.rafs != nil && (device == 0 || block == nullBlock):
		return bad("has no blob")
	case block == nullBlock:
		e.Device = Hole
		return nil
	}
	e.Device, e.Off = device, int64(block)<<m.sb.BlockBits
	*e, err = m.locate(*e)
	return err
}

// locate checks that e is inside its device. An address of the image itself may
// mean a device, by the unified address space (erofs_map_dev, fs/erofs/data.c).
func (m *Image) locate(e Extent) (Extent, error) {
	if e.Device > len(m.devices) {
		return e, bad("is in device %d of %d", e.Device, len(m.devices))
	}
	if e.Device == 0 {
		for i, d := range m.devices {
			start := int64(d.MappedBlkaddr) << m.sb.BlockBits
			if start > 0 && e.Off >= start && e.Off < start+int64(d.Blocks)<<m.sb.BlockBits {
				e.Device, e.Off = i+1, e.Off-start
				break
			}
		}
	}
	size := m.pages.size
	if e.Device > 0 {
		size = m.deviceSize(e.Device - 1)
	}
	if e.Off > size || e.Len > size-e.Off {
		return e, bad("[%d, +%d) is outside of device %d, which has %d bytes", e.Off, e.Len, e.Device, size)
	}
	return e, nil
}

// deviceSize returns the bytes of device i. mkfs.erofs 1.5 leaves the field
// zero: then it is what block numbers reach. Check does not accept that.
func (m *Image) deviceSize(i int) int64 {
	blocks := int64(m.devices[i].Blocks)
	if blocks == 0 && m.rafs == nil {
		blocks = 1 << 32
	}
	return blocks << m.sb.BlockBits
}
