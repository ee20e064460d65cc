// Package boltcheck reads a file of bbolt with suspicion.
//
// bbolt maps its file and believes it. One flipped bit has it read outside of the mapping,
// which ends the process, follow a page to itself without end, or take a page with data for
// a free one and write over it. Its own Tx.Check reads in the same way, in a goroutine of its own
// where a fault ends the process. What passes [Check] has none of that in it.
//
// Source: go.etcd.io/bbolt v1.5.0, internal/common (meta.go, page.go, bucket.go) and
// internal/freelist/shared.go.
package boltcheck

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// The form of a file. Its integers are as the machine has them.
const (
	magic   = 0xED0CDAED
	version = 2

	headerSize  = 16 // of a page: id, flags, count, overflow
	elementSize = 16 // of a branch or a leaf
	bucketSize  = 16 // root, sequence
	metaSize    = 64

	minPageSize, maxPageSize = 1 << 10, 1 << 24 // what bbolt looks for

	branchFlag, leafFlag, freelistFlag = 1, 2, 16

	bucketFlag = 1 // of a leaf's element

	noFreelist = ^uint64(0)
)

var native = binary.NativeEndian

// meta is the state after one transaction.
type meta struct {
	pageSize            uint64
	root, freelist, end uint64 // pages; end is the first one that is not of the file
	transaction         uint64
}

// checker knows which pages have been met, each of which has one use.
type checker struct {
	r    io.ReaderAt
	meta meta
	met  []bool
}

// Check reads all of the size bytes of a bbolt file, and returns an error if anything is not as
// bbolt writes it: a page that is outside, in two places or of a wrong kind, an element that is
// not in its page, keys out of order, a free page that is in use. Values that are no buckets
// are not looked at. Nobody may write to the file meanwhile. The memory that it takes is bounded
// by the size of the file.
func Check(r io.ReaderAt, size int64) error {
	m, err := newest(r)
	if err != nil {
		return err
	}
	if m.end > uint64(size)/m.pageSize {
		return fmt.Errorf("the file ends before its last page: %d pages of %d bytes in %d bytes", m.end, m.pageSize, size)
	}
	c := &checker{r: r, meta: m, met: make([]bool, m.end)}
	if err := c.tree(m.root, nil, nil); err != nil {
		return err
	}
	return c.freelist()
}

// newest returns the state that bbolt takes: the last one that was written whole. The second is
// a page further; its size is in the first, which may be the damaged one.
func newest(r io.ReaderAt) (meta, error) {
	first, err := readMeta(r, 0)
	if err != nil {
		return second(r, err)
	}
	if !first.sized() {
		return meta{}, fmt.Errorf("pages of %d bytes", first.pageSize)
	}
	switch second, err := readMeta(r, int64(first.pageSize)); {
	case err != nil:
		return first, nil
	case second.pageSize != first.pageSize:
		return meta{}, fmt.Errorf("pages of %d and of %d bytes", first.pageSize, second.pageSize)
	case second.transaction > first.transaction:
		return second, nil
	}
	return first, nil
}

// second looks for the second state, where the first one has an error.
func second(r io.ReaderAt, first error) (meta, error) {
	for at := uint64(minPageSize); at <= maxPageSize; at *= 2 {
		m, err := readMeta(r, int64(at))
		switch {
		case err != nil:
		case m.pageSize != at:
			return meta{}, fmt.Errorf("the second page is at %d, with pages of %d bytes", at, m.pageSize)
		default:
			return m, nil
		}
	}
	return meta{}, first
}

// sized reports whether pages have a size that bbolt knows.
func (m meta) sized() bool {
	return m.pageSize >= minPageSize && m.pageSize <= maxPageSize && m.pageSize&(m.pageSize-1) == 0
}

// readMeta reads the state at an offset, which is that of a page. It wants what bbolt wants,
// and not more: the two have to take the same.
func readMeta(r io.ReaderAt, at int64) (meta, error) {
	b := make([]byte, metaSize)
	if _, err := r.ReadAt(b, at+headerSize); err != nil {
		return meta{}, fmt.Errorf("read the first pages: %w", err)
	}
	sum := fnv.New64a()
	sum.Write(b[:metaSize-8])
	if native.Uint32(b) != magic || native.Uint32(b[4:]) != version || native.Uint64(b[metaSize-8:]) != sum.Sum64() {
		return meta{}, errors.New("the first pages are not those of such a file")
	}
	return meta{
		pageSize: uint64(native.Uint32(b[8:])), root: native.Uint64(b[16:]), freelist: native.Uint64(b[32:]),
		end: native.Uint64(b[40:]), transaction: native.Uint64(b[48:]),
	}, nil
}

// claim notes that the page is in use. It cannot be one of the first two, or one with another use.
func (c *checker) claim(id uint64) error {
	switch {
	case id < 2 || id >= c.meta.end:
		return fmt.Errorf("page %d is none of the file's 2 to %d", id, c.meta.end)
	case c.met[id]:
		return fmt.Errorf("page %d is in two places", id)
	}
	c.met[id] = true
	return nil
}

// page reads a page and those that belong to it, and claims them.
func (c *checker) page(id uint64) (page, error) {
	if err := c.claim(id); err != nil {
		return page{}, err
	}
	header := make([]byte, headerSize)
	at := int64(id * c.meta.pageSize)
	if _, err := c.r.ReadAt(header, at); err != nil {
		return page{}, fmt.Errorf("read page %d: %w", id, err)
	}
	if own := native.Uint64(header); own != id {
		return page{}, fmt.Errorf("page %d says that it is page %d", id, own)
	}
	more := uint64(native.Uint32(header[12:]))
	for i := range more {
		if err := c.claim(id + 1 + i); err != nil {
			return page{}, fmt.Errorf("page %d has %d more: %w", id, more, err)
		}
	}
	b := make([]byte, (1+more)*c.meta.pageSize)
	if _, err := c.r.ReadAt(b, at); err != nil {
		return page{}, fmt.Errorf("read page %d: %w", id, err)
	}
	return page{id, b}, nil
}

// tree checks a page and all below it. Its keys begin with low, which is what bbolt finds the
// page by when it has changed, and are below high, if these are given.
func (c *checker) tree(id uint64, low, high []byte) error {
	p, err := c.page(id)
	if err != nil {
		return err
	}
	switch p.flags() {
	case leafFlag:
		return c.leaf(p, low, high)
	case branchFlag:
		return c.branch(p, low, high)
	}
	return fmt.Errorf("page %d is neither branch nor leaf, but %#x", id, p.flags())
}

// branch checks the pages that a branch has below it.
func (c *checker) branch(p page, low, high []byte) error {
	elements, err := p.elements(branchElement, low, high)
	if err == nil && len(elements) == 0 {
		err = fmt.Errorf("page %d is empty, and a branch", p.id)
	}
	if err != nil {
		return err
	}
	for i, e := range elements {
		end := high
		if i+1 < len(elements) {
			end = elements[i+1].key
		}
		if err := c.tree(e.child, e.key, end); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks the buckets in a leaf.
func (c *checker) leaf(p page, low, high []byte) error {
	elements, err := p.elements(leafElement, low, high)
	if err != nil {
		return err
	}
	for _, e := range elements {
		if !e.bucket {
			continue
		}
		if err := c.bucket(p.id, e.value); err != nil {
			return fmt.Errorf("bucket %.40q: %w", e.key, err)
		}
	}
	return nil
}

// bucket checks a bucket, which a page has as a value. A small one has its only page in there.
func (c *checker) bucket(id uint64, value []byte) error {
	if len(value) < bucketSize {
		return fmt.Errorf("page %d: a bucket of %d bytes", id, len(value))
	}
	if root := native.Uint64(value); root != 0 {
		return c.tree(root, nil, nil)
	}
	inline := page{id, value[bucketSize:]}
	if len(inline.bytes) < headerSize || inline.flags() != leafFlag {
		return fmt.Errorf("page %d: a bucket without a leaf", id)
	}
	return c.leaf(inline, nil, nil)
}

// freelist checks that no page that is listed as free is in use. Without a list bbolt makes its own.
func (c *checker) freelist() error {
	if c.meta.freelist == noFreelist {
		return nil
	}
	p, err := c.page(c.meta.freelist)
	if err != nil {
		return fmt.Errorf("list of free pages: %w", err)
	}
	count, ids := uint64(p.count()), p.bytes[headerSize:]
	if count == 0xFFFF { // as many as are possible there, or more: then the first one is the count
		count, ids = native.Uint64(ids), ids[8:]
	}
	if p.flags() != freelistFlag || count > uint64(len(ids)/8) {
		return fmt.Errorf("page %d is no list of %d free pages", p.id, count)
	}
	for i := range count {
		if err := c.claim(native.Uint64(ids[8*i:])); err != nil {
			return fmt.Errorf("list of free pages: %w", err)
		}
	}
	return nil
}

// page is a page with those that belong to it; or the one page in the value of a bucket.
type page struct {
	id    uint64
	bytes []byte
}

func (p page) flags() uint16 { return native.Uint16(p.bytes[8:]) }
func (p page) count() uint16 { return native.Uint16(p.bytes[10:]) }

// element is what a page has under a key: the page below of a branch, or the value of a leaf.
type element struct {
	key, value []byte
	child      uint64
	bucket     bool
}

// elements reads all elements of a page by at, and checks that their keys begin with low, go up, and
// not to high.
func (p page) elements(at func(b []byte) (element, error), low, high []byte) ([]element, error) {
	n := int(p.count())
	if headerSize+n*elementSize > len(p.bytes) {
		return nil, fmt.Errorf("page %d cannot have %d elements", p.id, n)
	}
	if n == 0 && low != nil {
		return nil, fmt.Errorf("page %d is empty", p.id)
	}
	list := make([]element, 0, n)
	for i := range n {
		e, err := at(p.bytes[headerSize+i*elementSize:])
		switch {
		case err != nil:
			return nil, fmt.Errorf("page %d: element %d: %w", p.id, i, err)
		case len(e.key) == 0, i == 0 && low != nil && !bytes.Equal(e.key, low), i > 0 && bytes.Compare(e.key, list[i-1].key) <= 0, high != nil && bytes.Compare(e.key, high) >= 0:
			return nil, fmt.Errorf("page %d: the key of element %d is not in its place", p.id, i)
		}
		list = append(list, e)
	}
	return list, nil
}

// branchElement reads the element that b begins with; offsets in it are from there.
func branchElement(b []byte) (element, error) {
	key, err := part(b, uint64(native.Uint32(b)), uint64(native.Uint32(b[4:])))
	return element{key: key, child: native.Uint64(b[8:])}, err
}

// leafElement reads the element that b begins with; offsets in it are from there.
func leafElement(b []byte) (element, error) {
	flags, at, size := native.Uint32(b), uint64(native.Uint32(b[4:])), uint64(native.Uint32(b[8:]))
	if flags&^bucketFlag != 0 {
		return element{}, fmt.Errorf("flags %#x", flags)
	}
	key, kerr := part(b, at, size)
	value, verr := part(b, at+size, uint64(native.Uint32(b[12:])))
	return element{key: key, value: value, bucket: flags != 0}, errors.Join(kerr, verr)
}

// part returns size bytes of b, which begin at an offset.
func part(b []byte, at, size uint64) ([]byte, error) {
	if at+size > uint64(len(b)) {
		return nil, fmt.Errorf("%d bytes at %d are not in the page", size, at)
	}
	return b[at:][:size], nil
}
