package snapshotter

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
)

// Commit makes the active snapshot key the committed snapshot name. containerd calls it in
// a transaction of its own, so the files are counted before ours begins: nobody else
// waits for that.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	usage, err := s.usageOf(ctx, key)
	if err == nil {
		err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
			_, err := storage.CommitActive(ctx, key, name, usage, opts...)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("commit snapshot %s as %s: %w", key, name, err)
	}
	return nil
}

// usageOf counts the files of the snapshot key.
func (s *Snapshotter) usageOf(ctx context.Context, key string) (snapshots.Usage, error) {
	var id string
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	return s.count(ctx, id)
}

// count walks the directory of a snapshot.
func (s *Snapshotter) count(ctx context.Context, id string) (snapshots.Usage, error) {
	usage, err := fs.DiskUsage(ctx, s.upper(id))
	return snapshots.Usage(usage), err
}
