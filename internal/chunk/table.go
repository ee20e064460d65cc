package chunk

import (
	"errors"
	"fmt"
	"sort"
)

// A Table maps the cache file of a blob to the stored object, and knows the digests
// of the chunks. Its geometry never changes. 48 bytes a chunk, and 4 more in blobs
// with batches.
type Table struct {
	entry   Entry // with the place of the chunk table also where only the TOC had it
	size    int64
	chunks  []place
	digests []Digest
	batches []batch  // empty when the blob has none
	firsts  []uint32 // first chunk of each unit; nil when each chunk is one
}

// A place is where a chunk lies.
type place struct {
	page uint32 // offset in the cache file / 4096
	n    uint32 // bits 0-23 length - 1, then flags
	c    uint64 // bits 0-39 offset in the blob; 40-63 stored length - 1, or of a batch chunk the batch's number
}

const (
	placeCompressed = 1 << 24
	placeBatch      = 1 << 25
)

// A batch is a run of chunks that were compressed together.
type batch struct{ clen, plain uint32 }

func (p place) off() int64       { return int64(p.page) * pageSize }
func (p place) len() int64       { return int64(p.n&(1<<24-1)) + 1 }
func (p place) end() int64       { return p.off() + roundUp(p.len()) }
func (p place) coff() int64      { return int64(p.c & (1<<40 - 1)) }
func (p place) high() int64      { return int64(p.c >> 40) }
func (p place) batched() bool    { return p.n&placeBatch != 0 }
func (p place) compressed() bool { return p.n&placeCompressed != 0 }

// A Chunk is a run of bytes of the cache file with a digest of its own.
type Chunk struct {
	Off, Len   int64 // in the cache file
	COff, CLen int64 // in the stored object; of a chunk in a batch: the batch
	Compressed bool
	Digest     Digest
	Known      bool // Digest is known
}

// Size returns the size of the cache file, a multiple of 4096.
func (t *Table) Size() int64 { return t.size }

// Len returns the number of chunks.
func (t *Table) Len() int { return len(t.chunks) }

// Digester returns the algorithm of the chunks' digests.
func (t *Table) Digester() Digester { return t.entry.Digester }

// Chunk returns chunk i of Len.
func (t *Table) Chunk(i int) Chunk {
	p := t.chunks[i]
	clen, compressed := t.stored(p)
	return Chunk{
		Off: p.off(), Len: p.len(), COff: p.coff(), CLen: clen, Compressed: compressed,
		Digest: t.digests[i], Known: t.known(i),
	}
}

// stored returns the length that p, or its batch, has in the stored object.
func (t *Table) stored(p place) (n int64, compressed bool) {
	if p.batched() {
		b := t.batches[p.high()]
		return int64(b.clen), b.clen != b.plain
	}
	return p.high() + 1, p.compressed()
}

func (t *Table) known(i int) bool { return t.digests[i] != Digest{} }

// SetDigest records the digest of chunk i as the bootstrap's chunk table gives it,
// after comparing its place in the cache file with the geometry. A chunk that lies
// elsewhere, or has another digest already, is a *ConflictError. changed says that
// the digest was not known before. It must not run beside any other use of t.
func (t *Table) SetDigest(i int, off, n int64, d Digest) (changed bool, err error) {
	if i < 0 || i >= len(t.chunks) {
		return false, corruptf("image names chunk %d of a blob of %d chunks", i, len(t.chunks))
	}
	if d == (Digest{}) {
		return false, corruptf("image has no digest for chunk %d", i)
	}
	p, have := t.chunks[i], t.digests[i]
	known := t.known(i)
	if p.off() != off || p.len() != n || known && have != d {
		return false, &ConflictError{Chunk: i, Off: p.off(), Len: p.len(), WantOff: off, WantLen: n, Have: have, Want: d}
	}
	t.digests[i] = d
	return !known, nil
}

// A Unit is the smallest run that can be decoded alone: a chunk, or all chunks of
// a batch.
type Unit struct {
	First, Last int   // chunks; Last is not part of it
	Off, Len    int64 // in the cache file; both multiples of 4096, Len at most MaxUnitLen
	COff, CLen  int64 // in the stored object; CLen at most 16 MiB
}

// Units returns the number of units. They cover the cache file without gaps, in
// order.
func (t *Table) Units() int {
	if t.firsts == nil {
		return len(t.chunks)
	}
	return len(t.firsts)
}

// Unit returns unit u of Units.
func (t *Table) Unit(u int) Unit {
	first, last := t.span(u)
	p := t.chunks[first]
	clen, _ := t.stored(p)
	return Unit{
		First: first, Last: last,
		Off: p.off(), Len: t.chunks[last-1].end() - p.off(),
		COff: p.coff(), CLen: clen,
	}
}

// span returns the chunks of unit u.
func (t *Table) span(u int) (first, last int) {
	switch {
	case t.firsts == nil:
		return u, u + 1
	case u+1 < len(t.firsts):
		return int(t.firsts[u]), int(t.firsts[u+1])
	default:
		return int(t.firsts[u]), len(t.chunks)
	}
}

// UnitAt returns the unit that holds cache file offset off, which is not negative;
// Units when off is past the end.
func (t *Table) UnitAt(off int64) int {
	if off >= t.size {
		return t.Units()
	}
	page := uint32(off / pageSize)
	next := sort.Search(len(t.chunks), func(i int) bool { return t.chunks[i].page > page })
	return t.UnitOf(max(next-1, 0))
}

// UnitOf returns the unit that holds chunk i of Len.
func (t *Table) UnitOf(i int) int {
	if t.firsts == nil {
		return i
	}
	return sort.Search(len(t.firsts), func(u int) bool { return int(t.firsts[u]) > i }) - 1
}

// Needed reports whether unit u has a chunk whose digest is known. No image reads
// from the others.
func (t *Table) Needed(u int) bool {
	first, last := t.span(u)
	for i := first; i < last; i++ {
		if t.known(i) {
			return true
		}
	}
	return false
}

// Verify checks that data, Unit.Len bytes read back from the cache file, is what
// Decode made of unit u: chunks with a known digest match it, everything else is
// zero. The error is a *CorruptError.
func (t *Table) Verify(u int, data []byte) error {
	x := t.Unit(u)
	if int64(len(data)) != x.Len {
		return &CorruptError{Chunk: x.First, Err: lengthError(len(data), x.Len)}
	}
	for i := x.First; i < x.Last; i++ {
		p := t.chunks[i]
		b := data[p.off()-x.Off : p.end()-x.Off]
		n := int64(0) // bytes that a digest covers
		if t.known(i) {
			n = p.len()
			if err := t.check(i, b[:n]); err != nil {
				return err
			}
		}
		if !zero(b[n:]) {
			return &CorruptError{Chunk: i, Err: errors.New("bytes that no digest covers are not zero")}
		}
	}
	return nil
}

// check compares the plain bytes of chunk i with its digest.
func (t *Table) check(i int, p []byte) error {
	if got := t.entry.Digester.Sum(p); got != t.digests[i] {
		return &CorruptError{Chunk: i, Want: t.digests[i], Got: got}
	}
	return nil
}

func lengthError(got int, want int64) error {
	return fmt.Errorf("%d bytes, want %d", got, want)
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
