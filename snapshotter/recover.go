package snapshotter

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// Recover has all images that are mounted looked at again, and mounted again where the
// daemon does not serve them any more. Call it when the daemon was started. It does not wait:
// who wants an image meanwhile has it recovered at once, and the others follow in the
// background. Images that nothing has mounted wait until somebody wants them.
func (s *Snapshotter) Recover() {
	s.images.forget()
	select {
	case s.recover <- struct{}{}:
	default: // it is about to
	}
}

// Abandon unmounts all images, those of removed snapshots too, because their daemon is gone and
// no other one can begin as long as they are mounted. Containers keep what they have, and get
// errors for what is not in memory; new ones wait for the next daemon.
func (s *Snapshotter) Abandon() error {
	s.images.forget()
	dirs, err := s.directories()
	errs := []error{err}
	for _, dir := range dirs {
		point := filepath.Join(dir, "mnt")
		if !isImage(point) {
			continue
		}
		r, _ := readRecord(dir) // only for the log
		s.log.Warn("image is unmounted: nobody serves it", "image", r.name(), "snapshot", dir)
		failpoint.Hit("snapshotter.abandon")
		errs = append(errs, detachStale(point))
		failpoint.Hit("snapshotter.abandoned")
	}
	return errors.Join(errs...)
}

// directories returns those of all snapshots on the disk, removed or not.
func (s *Snapshotter) directories() (dirs []string, err error) {
	for name, below := range map[string]string{snapshotsDir: "", trashDir: trashed} {
		entries, rerr := os.ReadDir(s.path(name))
		err = errors.Join(err, rerr)
		for _, e := range entries {
			dirs = append(dirs, s.path(name, e.Name(), below))
		}
	}
	return dirs, err
}

// Pauses before images that could not be recovered are tried again.
const (
	recoverPause    = 500 * time.Millisecond
	recoverMaxPause = 30 * time.Second
)

// recoverOn recovers images until the end.
func (s *Snapshotter) recoverOn() {
	var again <-chan time.Time
	for pause := recoverPause; ; {
		select {
		case <-s.ctx.Done():
			return
		case <-s.recover:
			pause = recoverPause
		case <-again:
		}
		err := s.recoverAll()
		switch {
		case s.ctx.Err() != nil:
			return
		case err == nil:
			again = nil
		default:
			s.log.Warn("recover mounted images; it is tried again", "err", err)
			again, pause = time.After(pause), min(2*pause, recoverMaxPause)
		}
	}
}

// recoverAll recovers the images that are mounted, one after the other: one that fails does
// not keep the others.
func (s *Snapshotter) recoverAll() error {
	layers, err := s.mountedLayers()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range layers {
		if s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		errs = append(errs, s.recoverOne(l))
	}
	return errors.Join(errs...)
}

// recoverTime is how long an image may keep those after it waiting.
const recoverTime = time.Minute

func (s *Snapshotter) recoverOne(l lazyLayer) error {
	ctx, cancel := context.WithTimeout(s.ctx, recoverTime)
	defer cancel()
	failpoint.Hit("snapshotter.recover")
	_, err := s.mountImage(ctx, l)
	failpoint.Hit("snapshotter.recovered")
	return err
}

// mountedLayers returns the lazy layers whose images the kernel has mounted.
func (s *Snapshotter) mountedLayers() (layers []lazyLayer, err error) {
	err = s.store.WithTransaction(s.ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted || info.Labels[labelBootstrap] != "true" {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			layers = append(layers, lazyLayer{id: id, chainID: info.Labels[labelTarget], reference: referenceIn(info.Labels)})
			return nil
		})
	})
	var mounted []lazyLayer
	for _, l := range layers {
		_, err := readRecord(s.path(snapshotsDir, l.id))
		if !errors.Is(err, fs.ErrNotExist) && isImage(s.point(l.id)) {
			mounted = append(mounted, l)
		}
	}
	return mounted, err
}
