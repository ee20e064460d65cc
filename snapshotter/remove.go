package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// Remove removes a snapshot. It is gone at once; its files go in the background.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		failpoint.Hit("snapshotter.remove")
		return err
	})
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	failpoint.Hit("snapshotter.removed")
	s.shares.drop(id) // what it has counts for others at once
	s.garbage.add(id)
	return nil
}

// Cleanup removes what removed snapshots have left, and returns when that is done.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	if err := s.sweep(ctx, true); err != nil {
		s.garbage.look() // what it took and did not do is nowhere else
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// discard moves the directories of snapshots that do not exist into the trash. It returns
// those whose image should be unmounted before, or with all moves them too: a number comes
// again when the store was removed, but then never while the process lives.
func (s *Snapshotter) discard(ctx context.Context, all bool) (lazy []string, err error) {
	// Nobody makes a snapshot while this transaction lasts: what has no entry now never will.
	ctx, tx, err := s.store.TransactionContext(ctx, true)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback() // nothing was written
	known, err := storage.IDMap(ctx)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.path(snapshotsDir))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, e := range entries {
		id := e.Name()
		if _, ok := known[id]; ok {
			continue
		}
		if _, err := os.Lstat(s.point(id)); err == nil && !all {
			lazy = append(lazy, id)
			continue
		}
		_, err := s.discardOne(id)
		errs = append(errs, err)
	}
	return lazy, errors.Join(errs...)
}

// trashed is what the directory of a snapshot is called in its place in the trash.
const trashed = "snapshot"

// toTrash moves the directory of a snapshot into the trash and returns its place: a name that
// no other one has had, because numbers come again when somebody removes the store.
func (s *Snapshotter) toTrash(id string) (place string, err error) {
	if place, err = os.MkdirTemp(s.path(trashDir), id+"-"); err != nil {
		return "", err
	}
	failpoint.Hit("snapshotter.trash")
	if err := os.Rename(s.path(snapshotsDir, id), filepath.Join(place, trashed)); err != nil {
		return "", errors.Join(err, os.Remove(place))
	}
	failpoint.Hit("snapshotter.trashed")
	return place, nil
}

// discardOne moves the directory of a snapshot into the trash and forgets what is known of it.
func (s *Snapshotter) discardOne(id string) (place string, err error) {
	if place, err = s.toTrash(id); err == nil {
		s.images.drop(id)
		s.shares.drop(id)
	}
	return place, err
}

// emptyDir removes everything in dir. It can be interrupted, unlike os.RemoveAll, and
// goes on where it was when it is called again.
func emptyDir(ctx context.Context, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		name := filepath.Join(dir, e.Name())
		if e.IsDir() {
			if err := emptyDir(ctx, name); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
