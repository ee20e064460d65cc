package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// Commit makes the active snapshot key the committed snapshot name. containerd calls it in
// a transaction of its own, so the files are counted before ours begins: nobody else
// waits for that.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	opts = withoutLogin(opts)
	var id string
	var info snapshots.Info
	err := checkName(name)
	if err == nil {
		err = s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
			id, info, _, err = storage.GetInfo(ctx, key)
			return err
		})
	}
	var usage snapshots.Usage
	if err == nil {
		usage, err = s.count(ctx, id)
	}
	if err == nil && kindOf(info.Labels) == bootstrapLayer {
		err = s.checkBootstrap(id)
	}
	opts = append(opts, asPrepared(info.Labels))
	failpoint.Hit("snapshotter.commit")
	if err == nil {
		err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
			_, err := storage.CommitActive(ctx, key, name, usage, opts...)
			failpoint.Hit("snapshotter.committing")
			return err
		})
	}
	failpoint.Hit("snapshotter.committed")
	if err != nil {
		return fmt.Errorf("commit snapshot %.200s as %.200s: %w", key, name, err)
	}
	return nil
}

// checkBootstrap refuses a bootstrap layer that has none while the image is pulled, and
// not when it is wanted. One that there is, is made durable: after a power cut nobody could
// tell a torn one from what the image has.
func (s *Snapshotter) checkBootstrap(id string) error {
	f, err := s.bootstrap(id)
	if err != nil {
		return err
	}
	err = errors.Join(f.Sync(), f.Close())
	for dir := filepath.Dir(f.Name()); err == nil && len(dir) >= len(s.path(snapshotsDir)); dir = filepath.Dir(dir) {
		err = syncDir(dir)
	}
	return err
}

// syncDir makes the names in a directory durable.
func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// count walks the directory of a snapshot.
func (s *Snapshotter) count(ctx context.Context, id string) (snapshots.Usage, error) {
	usage, err := fs.DiskUsage(ctx, s.upper(id))
	return snapshots.Usage(usage), err
}
