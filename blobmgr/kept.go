package blobmgr

import (
	"context"
	"errors"
	"fmt"
)

// ErrOpen says that a blob cannot be forgotten while an image has it open.
var ErrOpen = errors.New("an image has it open")

// Forget removes everything that is kept of the blob called id, as [Blob.ID] returns
// it, in a domain. One that is open is an [ErrOpen]; one that is not kept is no error.
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
	if err := m.forgetFiles(file); err != nil {
		return fmt.Errorf("forget blob %s: %w", id, err)
	}
	return nil
}

// forgetFiles removes a blob's files. The clean mark goes first, and for good: after a power
// cut the cache file may be there again, and where the file system does not wait for that
// (ext4 with data=writeback) with another file's data in its blocks. The table goes last:
// until then a later Open knows whose data are left.
func (m *Manager) forgetFiles(file string) error {
	if m.dir.exists(file + cleanSuffix) {
		if err := m.dir.removeDurably(file + cleanSuffix); err != nil {
			return err
		}
	}
	if err := m.dir.remove(file); err != nil {
		return err
	}
	return m.dir.remove(file + metaSuffix)
}

// Usage returns how many bytes of disk the cache file of the blob called id takes, 0
// when there is none.
func (m *Manager) Usage(domain, id string) int64 {
	return m.dir.usage(Source{Domain: domain}.scoped(id))
}

// Known reports whether the chunk table and digests of the blob called id are kept in a
// domain, so that what a cache file has of it can be trusted.
func (m *Manager) Known(domain, id string) bool {
	return m.dir.exists(Source{Domain: domain}.scoped(id) + metaSuffix)
}
