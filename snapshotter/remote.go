package snapshotter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// A target is a layer that is committed without being unpacked.
type target struct {
	chainID string // as containerd knows it
	parent  string
	labels  map[string]string
}

// skip commits a layer with data as an empty snapshot, so that containerd does not fetch
// it. Success is an ErrAlreadyExists: containerd then looks for the committed snapshot by
// the label and the parent.
func (s *Snapshotter) skip(ctx context.Context, key string, t target) error {
	name, there, err := s.targetName(ctx, t)
	if err == nil && !there {
		err = s.commitEmpty(ctx, key, name, t)
	}
	if err != nil && !errdefs.IsAlreadyExists(err) { // somebody else was faster
		return err
	}
	return fmt.Errorf("layer %s stays remote: %w", t.chainID, errdefs.ErrAlreadyExists)
}

// targetName returns what the snapshot is called, and whether it is there: another namespace
// may have pulled the image. The same layer over another parent (one that was unpacked in
// each namespace) has another name.
func (s *Snapshotter) targetName(ctx context.Context, t target) (name string, there bool, err error) {
	sum := sha256.Sum256([]byte(t.parent))
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		for _, name = range []string{t.chainID, t.chainID + " over " + hex.EncodeToString(sum[:])} {
			_, info, _, err := storage.GetInfo(ctx, name)
			if errdefs.IsNotFound(err) {
				return nil
			}
			if err != nil {
				return err
			}
			if info.Kind == snapshots.KindCommitted && info.Parent == t.parent && info.Labels[labelTarget] == t.chainID {
				there = true
				return nil
			}
		}
		return fmt.Errorf("the names of layer %s are taken by snapshots that are something else; remove those: %w", t.chainID, errdefs.ErrFailedPrecondition)
	})
	return name, there, err
}

// commitEmpty makes the snapshot and commits it at once: no crash leaves it in between.
func (s *Snapshotter) commitEmpty(ctx context.Context, key, name string, t target) error {
	dir, err := s.newDirectory(snapshots.KindCommitted)
	if err != nil {
		return err
	}
	opts := snapshots.WithLabels(t.labels)
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, t.parent, opts)
		if err != nil {
			return err
		}
		if _, err := storage.CommitActive(ctx, key, name, snapshots.Usage{}, opts); err != nil {
			return err
		}
		return s.place(ctx, dir, sn.ID)
	})
	failpoint.Hit("snapshotter.skipped")
	return s.placed(dir, err)
}
