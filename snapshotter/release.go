package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// This is the way back of lazy.go, and its order: unmount, then unbind, then remove from the
// cache. Each step may have been done before a crash.

// releaseTime is how long the daemon may take for one image; a daemon that hangs keeps nobody
// else's files from being removed.
const releaseTime = 20 * time.Second

// detach unmounts the image of a snapshot that does not exist any more, and moves its
// directory into the trash, where its place is returned.
func (s *Snapshotter) detach(ctx context.Context, id string) (place string, err error) {
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	if r, err := readRecord(s.path(snapshotsDir, id)); err == nil {
		give, err := s.images.take(ctx, r.key()) // nobody mounts it again meanwhile
		if err != nil {
			return "", err
		}
		defer give()
	}
	failpoint.Hit("snapshotter.unmount")
	if err := s.unmount(ctx, s.point(id)); err != nil {
		return "", fmt.Errorf("remove snapshot %s: unmount its image: %w", id, err)
	}
	failpoint.Hit("snapshotter.unmounted")
	return s.discardOne(id)
}

// unmount unmounts what is at a place, whether the daemon knows it or not.
func (s *Snapshotter) unmount(ctx context.Context, point string) error {
	mounted, err := mountedAt(point)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !mounted {
		return nil
	}
	if err == nil {
		err = s.mounter.Unmount(ctx, api.UnmountRequest{Mountpoint: point})
	}
	if err == nil || absent(err) {
		err = detachStale(point)
	}
	return err
}

// emptyTrash deletes what is in the trash. An image that is used on, by a container that is
// still running or a pod that is ending, keeps its entry until the next time.
func (s *Snapshotter) emptyTrash(ctx context.Context) error {
	entries, err := os.ReadDir(s.path(trashDir))
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		errs = append(errs, s.destroy(ctx, s.path(trashDir, e.Name())))
	}
	return errors.Join(errs...)
}

// destroy deletes what is at a place in the trash, when the daemon has forgotten its image.
func (s *Snapshotter) destroy(ctx context.Context, place string) error {
	if err := s.release(ctx, place); err != nil {
		return err
	}
	failpoint.Hit("snapshotter.delete")
	err := emptyDir(ctx, place)
	if err == nil {
		failpoint.Hit("snapshotter.deleted")
		err = os.Remove(place)
	}
	return err
}

// release has the daemon forget the image whose record is in the trash, unless another
// snapshot has it.
func (s *Snapshotter) release(ctx context.Context, place string) error {
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	// It is unmounted already, unless the last process ended before that.
	if err := s.unmount(ctx, filepath.Join(place, trashed, "mnt")); err != nil {
		return fmt.Errorf("unmount what was removed: %w", err)
	}
	r, err := readRecord(filepath.Join(place, trashed))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		s.log.Warn("an image that is removed stays in the daemon's cache: nobody knows which it is", "err", err)
		return nil
	}
	give, err := s.images.take(ctx, r.key())
	if err != nil {
		return err
	}
	defer give()
	shared, err := s.recorded(r)
	if err != nil || shared {
		return err
	}
	failpoint.Hit("snapshotter.unbind")
	err = s.mounter.UnbindImage(ctx, api.ImageRequest{Image: r.Image, DomainID: r.Domain})
	if err == nil || absent(err) {
		failpoint.Hit("snapshotter.unbound")
		err = s.mounter.Remove(ctx, api.RemoveRequest{Image: r.Image, DomainID: r.Domain})
	}
	if err != nil && !absent(err) {
		return fmt.Errorf("remove image %s from the cache: %w", r.name(), err)
	}
	failpoint.Hit("snapshotter.forgotten")
	s.log.Info("image is removed", "image", r.name())
	return nil
}

// recorded reports whether a snapshot has the image r. The caller has the image's turn, so no
// other one gets it.
func (s *Snapshotter) recorded(r record) (bool, error) {
	entries, err := os.ReadDir(s.path(snapshotsDir))
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		other, err := readRecord(s.path(snapshotsDir, e.Name()))
		if err == nil && other.key() == r.key() {
			return true, nil
		}
	}
	return false, nil
}
