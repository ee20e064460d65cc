package blobmgr

import (
	"bytes"
	"context"

	"github.com/erofsd/erofsd/internal/chunk"
)

// loadTable gets the chunk table from an earlier Open or from s; isNew says that it
// is from s.
func (b *Blob) loadTable(ctx context.Context, s Source) (isNew bool, err error) {
	if p := b.m.dir.read(b.name+metaSuffix, maxMeta(b.entry)); p != nil {
		e, t, err := parseMeta(p)
		if err == nil && e != b.entry {
			return false, errOther
		}
		if err == nil && !b.tableIsWrong(ctx, s, t) {
			b.table, b.metaSum = t, metaSum(p)
			return false, nil
		}
		b.m.log.Warn("reading the chunk table again, the copy in the cache is unusable", "blob", b.name, "err", err)
	}
	b.table, err = readTable(ctx, s)
	return true, err
}

// tableIsWrong reports whether t, the kept table, is doubted and s has another one.
// Nothing vouches for what a table says of the stored bytes, so it may have been
// damaged on its way to us.
func (b *Blob) tableIsWrong(ctx context.Context, s Source, t *chunk.Table) bool {
	b.m.mu.Lock()
	doubted := b.m.doubted[b.name]
	b.m.mu.Unlock()
	if !doubted {
		return false
	}
	fresh, err := readTable(ctx, s)
	if err != nil {
		return false // with the old one what is there can be read
	}
	b.m.mu.Lock()
	delete(b.m.doubted, b.name)
	b.m.mu.Unlock()
	return !bytes.Equal(fresh.Marshal(), t.Marshal())
}

// doubtTable has the next newBlob compare the kept table with the store's: no origin has
// bytes that are right where the table says that they are.
func (b *Blob) doubtTable() {
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	b.m.doubted[b.name] = true
}

// extend records digests that are not known yet. Units that have one are verified
// again; Done may be open again.
func (b *Blob) extend(ctx context.Context, ds []ChunkDigest) error {
	if err := b.durable.take(ctx); err != nil {
		return err
	}
	defer b.durable.give()
	// The mark goes first: what it lists may be written again from here on.
	if err := b.removeMark(); err != nil {
		return err
	}
	units, err := b.doubtAll(ds)
	if err != nil {
		return err
	}
	if len(units) > 0 {
		b.nudge()
	}
	again := b.unsaved
	b.unsaved = true
	if err := b.disown(units, again); err != nil {
		return err
	}
	b.digests.RLock()
	p := marshalMeta(b.entry, b.table)
	b.digests.RUnlock()
	b.metaSum = metaSum(p)
	if err := b.m.dir.write(b.name+metaSuffix, p, b.m.opt.Attached); err != nil {
		return err
	}
	b.unsaved = false
	return nil
}

func (b *Blob) doubtAll(ds []ChunkDigest) ([]int, error) {
	b.digests.Lock()
	defer b.digests.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	units, err := learn(b.table, ds)
	b.gen.Add(1)
	b.doubt(units)
	return units, err
}
