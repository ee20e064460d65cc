package blobmgr

import (
	"context"
	"errors"
	"fmt"
)

// ErrOpen says that a blob cannot be forgotten while an image has it open.
var ErrOpen = errors.New("an image has it open")

// Forget removes everything that is kept of the blob called id, as [Blob.ID] returns
// it, in a domain, its sibling too ([Options.Sibling]). One that is open is an [ErrOpen]; one that is not kept is no error.
func (m *Manager) Forget(ctx context.Context, domain, id string) error {
	file := Source{Domain: domain}.scoped(id)
	n, err := m.take(ctx, file)
	if err != nil {
		return fmt.Errorf("forget blob %s: %w", id, err)
	}
	defer m.drop(file, n)
	defer n.turn.give()
	if n.blob != nil {
		return fmt.Errorf("forget blob %s: %w", id, ErrOpen)
	}
	if path := m.siblingPath(file); path != "" { // before the table that vouches for it
		if err := removeForGood(path); err != nil {
			return fmt.Errorf("forget blob %s: %w", id, err)
		}
	}
	if err := m.dir.discard(file); err != nil {
		return fmt.Errorf("forget blob %s: %w", id, err)
	}
	return nil
}

// discard removes what there is of a blob. The mark goes first and for good: it must not
// come back after a power cut and vouch for what a later Open wrote, nor for the cache file
// with another file's data in its blocks (ext4 with data=writeback). The table goes last:
// until then that knows whose data are left.
func (d *directory) discard(file string) error {
	if err := d.discardFile(file); err != nil {
		return err
	}
	return d.remove(file + metaSuffix)
}

// discardFile is discard that leaves the table.
func (d *directory) discardFile(file string) error {
	if err := d.removeDurably(file + cleanSuffix); err != nil {
		return err
	}
	return d.remove(file)
}

// Usage returns how many bytes of disk the cache file of the blob called id takes, 0
// when there is none.
func (m *Manager) Usage(domain, id string) int64 {
	return m.dir.usage(Source{Domain: domain}.scoped(id))
}

// Kept reports whether something is kept in a domain that says what the blob called id is,
// also when that is damaged.
func (m *Manager) Kept(domain, id string) bool {
	return m.dir.exists(Source{Domain: domain}.scoped(id) + metaSuffix)
}

// Known reports whether the chunk table and digests of the blob called id are kept in a
// domain, whole and undoubted, so that what a cache file has of it can be trusted. It reads
// them.
func (m *Manager) Known(domain, id string) bool {
	file := Source{Domain: domain}.scoped(id)
	m.mu.Lock()
	doubted := m.doubted[file]
	m.mu.Unlock()
	if doubted {
		return false
	}
	_, _, err := parseMeta(m.dir.read(file+metaSuffix, maxMetaFile))
	return err == nil
}
