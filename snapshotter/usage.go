package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/erofsd/erofsd/internal/api"
)

// Usage returns what a snapshot takes without its parents: of one that can be written now,
// else what was counted when it was committed, and for the layer with the bootstrap also what
// the daemon's cache has of the image. What images share is counted once, for the oldest.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	switch {
	case err != nil:
	case info.Kind == snapshots.KindActive:
		usage, err = s.count(ctx, id)
	case info.Kind == snapshots.KindCommitted && info.Labels[labelBootstrap] == "true":
		usage.Size += s.cached(ctx, id)
	}
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return usage, nil
}

// usageTimeout is how long a report of usage waits for the daemon.
const usageTimeout = 2 * time.Second

// cached returns the bytes in the daemon's cache that are counted for a snapshot. A daemon
// that does not answer is no reason to report nothing of the rest.
func (s *Snapshotter) cached(ctx context.Context, id string) int64 {
	r, err := readRecord(s.path(snapshotsDir, id))
	if errors.Is(err, fs.ErrNotExist) {
		return 0 // it was never mounted
	}
	ctx, cancel := context.WithTimeout(ctx, usageTimeout)
	defer cancel()
	var u api.Usage
	if err == nil {
		u, err = s.mounter.Usage(ctx, api.ImageRequest{Image: r.Image, DomainID: r.Domain})
	}
	if err != nil {
		if !absent(err) {
			s.log.Debug("usage of a lazy image", "image", r.name(), "err", err)
		}
		return 0
	}
	s.learn(ctx, r, u)
	metadata, blobs := u.Disk, int64(0)
	for _, b := range u.Blobs {
		metadata -= b.Disk
		if s.shares.hasBlob(id, b.ID) {
			blobs += b.Disk
		}
	}
	if !s.shares.hasImage(id) {
		metadata = 0
	}
	return blobs + metadata
}

// learn notes the blobs of the image r, whose usage is u, and asks for those of all images whose
// blobs are not known: once for each that is mounted.
func (s *Snapshotter) learn(ctx context.Context, r record, u api.Usage) {
	s.shares.setBlobs(r.key(), blobsOf(u))
	for _, r := range s.shares.unasked() {
		u, err := s.mounter.Usage(ctx, api.ImageRequest{Image: r.Image, DomainID: r.Domain})
		if err != nil && !absent(err) {
			s.log.Debug("usage of lazy images", "image", r.name(), "err", err)
			return // until the next time they may count twice
		}
		s.shares.setBlobs(r.key(), blobsOf(u))
	}
}

// blobsOf returns the names of the blobs of an image.
func blobsOf(u api.Usage) []string {
	ids := []string{}
	for _, b := range u.Blobs {
		ids = append(ids, b.ID)
	}
	return ids
}
