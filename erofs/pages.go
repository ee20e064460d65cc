package erofs

import (
	"fmt"
	"io"
	"sync"
)

const (
	pageSize  = 64 << 10
	pageSlots = 512 // 32 MiB: an ordinary image is read once, whatever the order
)

// pages reads an image in large pieces and keeps the last ones: the structures
// of a bootstrap are small and lie close together, a read for each of them
// would cost more than all the rest. It may be used by several goroutines.
type pages struct {
	r    io.ReaderAt
	size int64

	mu    sync.Mutex // guards slots; not held while reading
	slots [pageSlots]page
}

// A page is never changed once it is in a slot.
type page struct {
	number int64
	data   []byte // nil: none
}

// read returns n bytes at off, which the caller must not change. A range that
// is not inside the image is a *FormatError.
func (p *pages) read(off, n int64) ([]byte, error) {
	if off < 0 || n < 0 || off > p.size || n > p.size-off {
		return nil, bad("bytes [%d, +%d) are outside of the image of %d bytes", off, n, p.size)
	}
	if n == 0 {
		return nil, nil
	}
	first, last := off/pageSize, (off+n-1)/pageSize
	if first == last {
		data, err := p.page(first)
		if err != nil {
			return nil, err
		}
		at := off % pageSize
		return data[at : at+n : at+n], nil
	}
	out := make([]byte, 0, n)
	for k := first; k <= last; k++ {
		data, err := p.page(k)
		if err != nil {
			return nil, err
		}
		at := max(off-k*pageSize, 0)
		out = append(out, data[at:min(int64(len(data)), off+n-k*pageSize)]...)
	}
	return out, nil
}

func (p *pages) page(number int64) ([]byte, error) {
	slot := &p.slots[number%pageSlots]
	p.mu.Lock()
	have := *slot
	p.mu.Unlock()
	if have.data != nil && have.number == number {
		return have.data, nil
	}
	off := number * pageSize
	data := make([]byte, min(pageSize, p.size-off))
	if n, err := p.r.ReadAt(data, off); n < len(data) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read %d bytes at %d: %w", len(data), off, err)
	}
	p.mu.Lock()
	*slot = page{number, data}
	p.mu.Unlock()
	return data, nil
}
