package blobmgr

import (
	"github.com/erofsd/erofsd/internal/chunk"
)

// A keptBlob is what the cache directory has of a blob, read without opening that.
type keptBlob struct {
	table *chunk.Table
	sum   [32]byte // of NAME.meta
	clean bitmap
	file  cacheFile
	close func() error
}

// openKept reads what there is of a blob; nil when no clean mark lists anything.
func (m *Manager) openKept(file string) (*keptBlob, error) {
	p := m.dir.read(file+metaSuffix, maxMetaFile)
	if p == nil {
		return nil, nil
	}
	_, t, err := parseMeta(p)
	if err != nil {
		return nil, nil // the next Open reads it again, and believes no mark
	}
	k := &keptBlob{table: t, sum: metaSum(p)}
	var ok bool
	if k.clean, ok = parseClean(m.dir.read(file+cleanSuffix, 1<<10+int64(t.Units())), k.sum, t.Units()); !ok {
		return nil, nil
	}
	f, err := m.dir.openKept(file, t.Size())
	if f == nil || err != nil {
		return nil, err
	}
	k.file, k.close = sparseFile{f}, f.Close
	if m.opt.wrap != nil {
		k.file = m.opt.wrap(k.file)
	}
	return k, nil
}

// inspect returns the listed units of [first, last) that are wrong; all when they cannot
// be read.
func (k *keptBlob) inspect(s *scrub, first, last int) (wrong []int) {
	if first >= last {
		return nil
	}
	p, err := s.read(k.file, k.table, first, last)
	base := k.table.Unit(first).Off
	for u := first; u < last; u++ {
		x := k.table.Unit(u)
		if k.clean.has(u) && (err != nil || k.table.Verify(u, p[x.Off-base:][:x.Len]) != nil) {
			wrong = append(wrong, u)
		}
	}
	return wrong
}
