package blobmgr

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// end ends the process in one way or another, and the machine too perhaps.
func (h *history) end() {
	orderly := h.m == nil || h.r.IntN(2) == 0
	switch {
	case h.m == nil:
	case orderly:
		h.found.ends.Add(1)
		err := h.m.Close()
		h.did("end: %v", err)
		if err != nil && h.well {
			h.errorf("close the cache: %v", err)
		}
	default:
		h.found.kills.Add(1)
		h.did("kill")
		h.kill()
	}
	h.m, h.blobs = nil, nil
	h.disk.mu.Lock()
	cut := h.disk.dead || h.r.IntN(3) == 0
	h.disk.mu.Unlock()
	if cut {
		h.found.cuts.Add(1)
		h.did("cut")
		h.disk.cut()
		h.boot++
	}
	if h.r.IntN(3) == 0 {
		h.damage(cut)
	}
}

// kill ends the process as SIGKILL does.
func (h *history) kill() {
	m := h.m
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	for _, n := range m.names {
		if b := n.blob; b != nil {
			b.stop(os.ErrClosed)
			for _, o := range b.origins {
				o.close()
			}
			b.closeFile()
		}
	}
	m.memory.Close()
	m.dir.Close()
}

// damage changes the files of a cache that nobody has. What a clean mark vouches for
// stays: only a scrub can tell; but not after the machine went down.
func (h *history) damage(cut bool) {
	id := h.x.entry.ID
	vouched := func(int64) bool { return false }
	if _, err := os.Lstat(filepath.Join(h.disk.dir, runningName)); !cut || err != nil {
		vouched = h.vouched()
	}
	name := []string{id, id, id + metaSuffix, id + cleanSuffix}[h.r.IntN(4)]
	path := filepath.Join(h.disk.dir, name)
	h.did("damage %s", filepath.Ext(name))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		h.t.Fatal(err)
	}
	switch h.r.IntN(8) {
	case 0:
		err = f.Truncate(h.r.Int64N(st.Size() + 1))
	case 1:
		err = os.Remove(path)
	default:
		for range 1 + h.r.IntN(5) {
			off := h.r.Int64N(max(st.Size(), 1))
			p := make([]byte, 1)
			if _, e := f.ReadAt(p, off); e != nil || name == id && vouched(off) {
				continue
			}
			p[0] ^= 1 << h.r.IntN(8)
			_, e := f.WriteAt(p, off)
			err = errors.Join(err, e)
			h.found.flips.Add(1)
			if cut && name == id {
				h.found.rots.Add(1)
			}
		}
	}
	if err != nil {
		h.t.Fatal(err)
	}
	h.disk.reload(name)
}

// vouched returns which bytes of the cache file the clean mark lists.
func (h *history) vouched() func(int64) bool {
	read := func(suffix string) []byte {
		p, err := os.ReadFile(filepath.Join(h.disk.dir, h.x.entry.ID+suffix))
		if err != nil && !errors.Is(err, syscall.ENOENT) {
			h.t.Fatal(err)
		}
		return p
	}
	p := read(metaSuffix)
	_, table, err := parseMeta(p)
	if err != nil {
		return func(int64) bool { return false }
	}
	clean, _ := parseClean(read(cleanSuffix), metaSum(p), table.Units())
	return func(off int64) bool { return clean.has(table.UnitAt(off)) }
}

// recover shows that a machine which is well again has a cache that works, and keeps. A
// chunk table that came damaged from the store is found out by the first use.
func (h *history) recover() {
	h.disk.mu.Lock()
	h.disk.budget, h.disk.faulty, h.well, h.partly = -1, 0, false, false
	h.disk.mu.Unlock()
	h.store = &store{stored: h.x.stored}
	h.final()
	h.well = true
	h.final()
	h.store = unreachable(h.x)
	h.final()
	left, err := os.ReadDir(h.disk.dir)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range left {
		if e.Name() == runningName || strings.HasSuffix(e.Name(), tmpSuffix) {
			h.errorf("left behind: %s", e.Name())
		}
	}
}

// final is a run that uses all of the blob; and in the same process again.
func (h *history) final() {
	if h.m = h.start(); h.m == nil {
		return
	}
	for again := h.misled; ; again = false {
		h.open()
		if len(h.blobs) == 0 {
			break
		}
		b := h.blobs[0]
		h.fill(b, 0, b.Size(), false)
		h.check(b)
		h.close(0)
		if !again {
			break
		}
	}
	if err := h.m.Close(); err != nil {
		h.errorf("close in the end: %v", err)
	}
}
