package blobmgr

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
)

// A powerDisk is a directory that remembers what of it was made durable, so that it can
// become what a power cut leaves; and a disk that fails. A name and the bytes of a file
// are durable only after the sync of each: nothing is ordered that POSIX does not order.
type powerDisk struct {
	t   testing.TB
	dir string

	mu     sync.Mutex // guards what follows
	r      *rand.Rand
	now    map[string]*inode
	kept   map[string]*inode // what is durable of now
	ops    []nameOp          // what is not, in order
	budget int               // calls until the power goes; negative: it does not
	dead   bool              // it is gone
	faulty int               // one in so many calls fails; 0: none
}

// A nameOp makes name mean ino, or nothing, and from nothing any more.
type nameOp struct {
	name, from string
	ino        *inode
}

// An inode is a file.
type inode struct {
	size    int64
	sized   bool         // durably
	disk    []byte       // durable bytes
	data    map[int]bool // pages of disk that are no hole
	pending []piece      // writes that are not durable
	ghosts  map[int]bool // pages that the disk failed to write: right until they are dropped
}

type piece struct {
	off int64
	p   []byte
}

func newPowerDisk(t testing.TB, dir string, r *rand.Rand) *powerDisk {
	return &powerDisk{t: t, dir: dir, r: r, now: map[string]*inode{}, kept: map[string]*inode{}, budget: -1}
}

// call accounts for one call; the error is what it fails with.
func (d *powerDisk) call() error {
	if d.budget == 0 {
		d.dead = true
	}
	d.budget--
	switch {
	case d.dead:
		return syscall.EIO
	case d.faulty > 0 && d.r.IntN(d.faulty) == 0:
		return []error{syscall.EIO, syscall.ENOSPC}[d.r.IntN(2)]
	}
	return nil
}

// A powerNames is the fileSystem of a powerDisk.
type powerNames struct {
	fileSystem
	d *powerDisk
}

func (n powerNames) open(name string, flags int) (*os.File, error) {
	d := n.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call(); err != nil {
		return nil, err
	}
	f, err := n.fileSystem.open(name, flags)
	if err == nil && flags&os.O_CREATE != 0 {
		d.now[name] = &inode{data: map[int]bool{}, ghosts: map[int]bool{}}
		d.ops = append(d.ops, nameOp{name: name, ino: d.now[name]})
	}
	return f, err
}

func (n powerNames) write(f *os.File, p []byte) error {
	d := n.d
	d.mu.Lock()
	defer d.mu.Unlock()
	ino, err := d.now[filepath.Base(f.Name())], d.call()
	if err != nil {
		p = p[:d.r.IntN(len(p))]
	}
	if d.dead {
		return err
	}
	ino.size = int64(len(p))
	ino.pending = append(ino.pending, piece{0, slices.Clone(p)})
	if e := n.fileSystem.write(f, p); e != nil {
		return e
	}
	return err
}

func (n powerNames) syncFile(f *os.File) error {
	d := n.d
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sync(d.now[filepath.Base(f.Name())])
}

// sync makes ino durable. If that fails some of it is, and the rest never will be.
func (d *powerDisk) sync(ino *inode) error {
	err := d.call()
	if d.dead {
		return err
	}
	for _, w := range ino.pending {
		if err == nil || d.r.IntN(2) == 0 {
			ino.apply(w)
			continue
		}
		for page := w.off / pageSize; page*pageSize < w.off+int64(len(w.p)); page++ {
			ino.ghosts[int(page)] = true
		}
	}
	ino.pending = nil
	ino.sized = ino.sized || err == nil
	return err
}

// apply makes w durable.
func (ino *inode) apply(w piece) {
	end := w.off + int64(len(w.p))
	if grow := end - int64(len(ino.disk)); grow > 0 {
		ino.disk = append(ino.disk, make([]byte, grow)...)
	}
	copy(ino.disk[w.off:], w.p)
	for page := w.off / pageSize; page*pageSize < end; page++ {
		ino.data[int(page)] = true
	}
}

func (n powerNames) rename(from, to string) error {
	d := n.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call(); err != nil {
		return err
	}
	if err := n.fileSystem.rename(from, to); err != nil {
		return err
	}
	d.now[to] = d.now[from]
	delete(d.now, from)
	d.ops = append(d.ops, nameOp{name: to, from: from, ino: d.now[to]})
	return nil
}

func (n powerNames) unlink(name string) error {
	d := n.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call(); err != nil {
		return err
	}
	err := n.fileSystem.unlink(name)
	if err == nil {
		delete(d.now, name)
		d.ops = append(d.ops, nameOp{name: name})
	}
	return err
}

func (n powerNames) sync() error {
	d := n.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call(); err != nil {
		return err
	}
	d.kept, d.ops = maps.Clone(d.now), nil
	return nil
}

// A powerFile is a cache file on a powerDisk.
type powerFile struct {
	cacheFile
	d   *powerDisk
	ino *inode
}

// file is an Options.wrap.
func (d *powerDisk) file(f cacheFile) cacheFile {
	d.mu.Lock()
	defer d.mu.Unlock()
	real := f.(sparseFile)
	ino := d.now[filepath.Base(real.Name())]
	st, err := real.Stat()
	if err != nil {
		d.t.Fatal(err)
	}
	ino.size = st.Size()
	return &powerFile{f, d, ino}
}

func (f *powerFile) ReadAt(p []byte, off int64) (int, error) {
	f.d.mu.Lock()
	err := f.d.call()
	f.d.mu.Unlock()
	if err != nil {
		return 0, syscall.EIO
	}
	return f.cacheFile.ReadAt(p, off)
}

func (f *powerFile) WriteAt(p []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.d.call()
	if f.d.dead {
		return 0, err
	}
	if err != nil {
		p = p[:f.d.r.IntN(len(p))]
	}
	f.ino.pending = append(f.ino.pending, piece{off, slices.Clone(p)})
	for page := off / pageSize; page*pageSize < off+int64(len(p)); page++ {
		delete(f.ino.ghosts, int(page))
	}
	if n, e := f.cacheFile.WriteAt(p, off); e != nil {
		return n, e
	}
	return len(p), err
}

func (f *powerFile) Datasync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.d.sync(f.ino)
}

// drop makes the kernel forget pages that it could not write.
func (d *powerDisk) drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, ino := range d.now {
		if len(ino.ghosts) == 0 {
			continue
		}
		if err := d.restore(name, ino, slices.Collect(maps.Keys(ino.ghosts))); err != nil {
			d.t.Fatal(err)
		}
		clear(ino.ghosts)
	}
}

// restore makes pages of a file what the disk has.
func (d *powerDisk) restore(name string, ino *inode, pages []int) error {
	f, err := os.OpenFile(filepath.Join(d.dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, page := range pages {
		off := int64(page) * pageSize
		if !ino.data[page] {
			// KEEP_SIZE and PUNCH_HOLE
			if err := syscall.Fallocate(int(f.Fd()), 3, off, pageSize); err != nil {
				return err
			}
			continue
		}
		p := make([]byte, max(min(pageSize, ino.size-off), 0))
		copy(p, ino.disk[min(off, int64(len(ino.disk))):])
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return nil
}

// cut makes the directory what is left of it after a power cut.
func (d *powerDisk) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	names, last, any := maps.Clone(d.kept), d.r.IntN(len(d.ops)+1), d.r.IntN(2) == 0
	for i, op := range d.ops {
		if any && d.r.IntN(2) == 0 || !any && i >= last {
			continue
		}
		delete(names, op.from)
		if delete(names, op.name); op.ino != nil {
			names[op.name] = op.ino
		}
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, e := range entries {
		os.Remove(filepath.Join(d.dir, e.Name()))
	}
	d.now = map[string]*inode{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		d.now[name] = d.torn(names[name])
		if err := d.make(name, d.now[name]); err != nil {
			d.t.Fatal(err)
		}
	}
	d.kept, d.ops, d.dead, d.budget = maps.Clone(d.now), nil, false, -1
}

// torn is what is left of ino: any sectors of what was not durable, and pages that were
// allocated and not written. A sector that had something has that or what is new.
func (d *powerDisk) torn(ino *inode) *inode {
	left := &inode{size: ino.size, sized: true, disk: bytes.Clone(ino.disk), data: maps.Clone(ino.data), ghosts: map[int]bool{}}
	sector, chance := []int{512, pageSize}[d.r.IntN(2)], 1+d.r.IntN(8)
	for _, w := range ino.pending {
		for at := 0; at < len(w.p); at += sector {
			part := w.p[at:min(at+sector, len(w.p))]
			switch {
			case d.r.IntN(chance) == 0:
				left.apply(piece{w.off + int64(at), part})
			case d.r.IntN(4) == 0 && !ino.data[int((w.off+int64(at))/pageSize)]:
				left.apply(piece{w.off + int64(at), make([]byte, len(part))})
			}
		}
	}
	if !ino.sized && d.r.IntN(4) == 0 {
		left.size = d.r.Int64N(ino.size + 1)
	}
	return left
}

// make makes a file.
func (d *powerDisk) make(name string, ino *inode) error {
	f, err := os.OpenFile(filepath.Join(d.dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(ino.size); err != nil {
		return err
	}
	var pages []int
	for page := range ino.data {
		if int64(page)*pageSize < ino.size {
			pages = append(pages, page)
		}
	}
	return d.restore(name, ino, pages)
}

// reload learns what somebody else did to the files.
func (d *powerDisk) reload(names ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, name := range names {
		p, err := os.ReadFile(filepath.Join(d.dir, name))
		if err != nil {
			delete(d.now, name)
			delete(d.kept, name)
			continue
		}
		ino := &inode{size: int64(len(p)), sized: true, data: map[int]bool{}, ghosts: map[int]bool{}}
		ino.apply(piece{0, p})
		d.now[name], d.kept[name] = ino, ino
	}
}
