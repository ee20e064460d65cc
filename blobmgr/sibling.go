package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
)

// A sibling is the file that the other transport has of a blob: the kernel's of a machine
// that had cachefiles before it had fanotify, or ours of one that went the other way. It
// has the blob's bytes at the same offsets, decoded; but nobody vouches for them here. So
// it is a source like a backend, asked before all of them: what it gives is checked
// against the digests, written and marked as if it were fetched. It is only ever read,
// and removed when nothing is left to take, or when there is no room for both.
//
// The kernel's file is trusted by a later daemon with cachefiles, as far as its data go,
// because the chunk table is kept: see disown.
type sibling struct {
	m      *Manager
	f      *os.File
	has    bitmap       // units that may be had
	remove func() error // takes its name away for good
	closed atomic.Bool
}

// openSibling finds the sibling of b, whose size is known.
func (b *Blob) openSibling() {
	f, remove, err := b.siblingFile()
	if f == nil && err == nil {
		return
	}
	s := &sibling{m: b.m, f: f, has: newBitmap(b.table.Units()), remove: remove}
	if err == nil {
		err = sparseFile{f}.Data(b.size, func(off, end int64) {
			first, last := b.covered(off, end)
			for u := first; u < last; u++ {
				s.has.set(u)
			}
		})
	}
	if err != nil {
		b.m.log.Warn("what another transport has kept of a blob cannot be read; it is fetched", "blob", b.name, "err", errors.Join(err, f.Close()))
		return
	}
	b.sibling = s
	b.m.mu.Lock()
	b.m.siblings[s] = true
	b.m.mu.Unlock()
}

// siblingFile opens the file; nil when there is none of b's size that only we, or the
// kernel, can have written.
func (b *Blob) siblingFile() (*os.File, func() error, error) {
	if b.m.opt.Attached {
		f, err := b.m.dir.openKept(b.name, b.size)
		return f, func() error { return b.m.dir.discardFile(b.name) }, err
	}
	path := b.m.siblingPath(b.name)
	if path == "" {
		return nil, nil, nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if size, ok := owned(f); !ok || size != b.size {
		return nil, nil, f.Close()
	}
	return f, func() error { return removeForGood(path) }, nil
}

// siblingPath is where the kernel keeps the blob whose cache file is called name; empty:
// nowhere.
func (m *Manager) siblingPath(name string) string {
	if m.opt.Sibling == nil {
		return ""
	}
	return m.opt.Sibling(unscoped(name))
}

// unscoped is the opposite of Source.scoped.
func unscoped(name string) (domain, id string) {
	if domain, id, ok := strings.Cut(name, ","); ok {
		return domain, id
	}
	return "", name
}

// removeForGood unlinks path so that it does not come back after a power cut, also when
// somebody else has just unlinked it.
func removeForGood(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// disown takes the name of the kernel's file away before the chunk table changes so that
// it would vouch for more than that file's data were checked against: when the table is a
// new one (all), or units get digests whose data are there. What is open is read on.
func (b *Blob) disown(units []int, all bool) error {
	path := b.m.siblingPath(b.name)
	if path == "" || b.m.opt.Attached {
		return nil
	}
	if s := b.sibling; !all && (s == nil || !slices.ContainsFunc(units, s.has.has)) {
		return nil
	}
	if err := removeForGood(path); err != nil {
		return fmt.Errorf("remove what cachefiles has kept under another chunk table: %w", err)
	}
	return nil
}

// reuse fills units from the sibling and returns those that must be fetched.
func (b *Blob) reuse(ctx context.Context, f *flight, units []int) []int {
	if b.sibling == nil {
		return units
	}
	var offered, absent []int
	for _, u := range units {
		if b.sibling.has.has(u) {
			offered = append(offered, u)
		} else {
			absent = append(absent, u)
		}
	}
	if len(offered) == 0 {
		return units
	}
	for _, run := range b.runs(offered) {
		absent = append(absent, b.reuseRun(ctx, f, run)...)
	}
	slices.Sort(absent)
	return absent
}

// reuseRun copies the units of run whose bytes in the sibling are right, and returns the
// others, which are not looked for there again.
func (b *Blob) reuseRun(ctx context.Context, f *flight, run []int) (wrong []int) {
	first, last := b.table.Unit(run[0]), b.table.Unit(run[len(run)-1])
	n := last.Off + last.Len - first.Off
	w, err := b.m.memory.worker(ctx, n)
	if err != nil {
		return run
	}
	defer b.m.memory.done(w)
	gen := b.gen.Load()
	_, rerr := b.sibling.f.ReadAt(w.buf[:n], first.Off)
	good := 0 // run[good:i] is right and not written
	for i, u := range run {
		x := b.table.Unit(u)
		if rerr == nil && b.matches(u, w.buf[x.Off-first.Off:][:x.Len]) == nil {
			b.reused.Add(x.Len)
			continue
		}
		b.sibling.has.clear(u)
		wrong = append(wrong, u)
		b.write(f, run[good:i], w.buf, first.Off, gen)
		good = i + 1
	}
	b.write(f, run[good:], w.buf, first.Off, gen)
	return wrong
}

// endSibling removes the sibling when b needs nothing of it any more (all), or has
// everything that it has.
func (b *Blob) endSibling(all bool) {
	s := b.sibling
	if s == nil || !all && !s.exhausted(b.present) {
		return
	}
	dropped, err := s.drop()
	if err != nil {
		b.m.log.Warn("remove what another transport has kept of a blob", "blob", b.name, "err", err)
	} else if dropped {
		b.m.log.Info("took what another transport has kept of a blob, and removed it", "blob", b.name, "bytes", b.reused.Load())
	}
}

// exhausted reports whether everything in s is present.
func (s *sibling) exhausted(present bitmap) bool {
	for i := range s.has {
		if s.has[i].Load()&^present[i].Load() != 0 {
			return false
		}
	}
	return true
}

// close lets go of s, if there is one; it stays for the next time. Who reads from it gets
// an error. It returns false when that was done already.
func (s *sibling) close() bool {
	if s == nil {
		return false
	}
	s.m.mu.Lock()
	delete(s.m.siblings, s)
	s.m.mu.Unlock()
	if s.closed.Swap(true) {
		return false
	}
	if err := s.f.Close(); err != nil {
		s.m.log.Debug("close what another transport has kept of a blob", "err", err)
	}
	return true
}

// drop removes s and gives its disk back. It returns false when s was closed before.
func (s *sibling) drop() (bool, error) {
	if !s.close() {
		return false, nil
	}
	return true, s.remove()
}

// DropSiblings removes what the other transport has kept of open blobs, and returns how
// many bytes of disk that gives back: what is not taken from there yet is fetched. An
// error is of a file that stays.
func (m *Manager) DropSiblings() (n int64, err error) {
	m.mu.Lock()
	var all []*sibling
	for s := range m.siblings {
		all = append(all, s)
	}
	m.mu.Unlock()
	var errs []error
	for _, s := range all {
		var blocks int64
		if st, err := s.f.Stat(); err == nil {
			blocks = st.Sys().(*syscall.Stat_t).Blocks
		}
		dropped, err := s.drop()
		if err == nil && dropped {
			n += blocks * 512
		}
		errs = append(errs, err)
	}
	return n, errors.Join(errs...)
}

// makeRoom reports whether there may be room again after a write found the disk full.
func (m *Manager) makeRoom(ctx context.Context) bool {
	n, err := m.DropSiblings()
	if err != nil {
		m.log.Warn("remove what another transport has kept, on a full disk", "err", err)
	}
	return n > 0 || m.room.plead(ctx)
}
