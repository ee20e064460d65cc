package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// Prepare makes a writable snapshot over parent and returns its mounts. For a layer that
// stays remote it is an ErrAlreadyExists: it is committed then.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	labels, err := labelsOf(opts)
	if _, login := labels[labelPullSecret]; login {
		s.loginLabel.Do(func() {
			s.log.Warn("logins in labels are ignored: containerd stores them in clear; say where logins come from with credentials.providers in the configuration")
		})
	}
	opts = withoutLogin(opts)
	if err == nil {
		err = errors.Join(checkName(key), checkTarget(labels))
	}
	if err == nil {
		if chainID := labels[labelTarget]; chainID != "" {
			what, why := decision(labels)
			s.log.Debug("layer is "+what, "layer", chainID, "image", referenceIn(labels), "why", why)
		}
		switch kindOf(labels) {
		case dataLayer:
			err = s.skip(ctx, key, target{chainID: labels[labelTarget], parent: parent, labels: publicLabels(labels)})
		case bootstrapLayer:
			err = s.checkImage(ctx, labels)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("prepare snapshot %.200s: %w", key, err)
	}
	failpoint.Hit("snapshotter.labels")
	return s.make(ctx, snapshots.KindActive, key, parent, opts)
}

// checkImage refuses an image that could not be mounted, before its metadata are fetched.
func (s *Snapshotter) checkImage(ctx context.Context, labels map[string]string) error {
	if err := checkVersion(labels); err != nil {
		return err
	}
	if err := checkReference(labels); err != nil {
		return err
	}
	if s.find != nil {
		return nil // containerd knows the reference when the image has been pulled
	}
	_, err := s.source(ctx, referenceIn(labels))
	return err
}

// View makes a read-only snapshot of parent and returns its mounts.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if err := checkName(key); err != nil {
		return nil, fmt.Errorf("view: %w", err)
	}
	return s.make(ctx, snapshots.KindView, key, parent, withoutLogin(opts))
}

// make makes a snapshot and has the image below it mounted. If that fails there is no
// snapshot either: who wants it tries again under the same key.
func (s *Snapshotter) make(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	sn, err := s.create(ctx, kind, key, parent, opts)
	if err != nil {
		return nil, fmt.Errorf("prepare snapshot %.200s: %w", key, err)
	}
	failpoint.Hit("snapshotter.created")
	m, err := s.mounts(ctx, sn)
	if err == nil {
		err = s.ownAsImage(sn)
	}
	failpoint.Hit("snapshotter.prepared")
	s.tell(sn, err)
	if err != nil {
		err = fmt.Errorf("prepare snapshot %.200s: %w", key, err)
		return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	return m, nil
}

// tell has logged whether a container's image is served lazily, and why.
func (s *Snapshotter) tell(sn snapshot, err error) {
	switch {
	case sn.info.Labels[labelTarget] != "" || sn.info.Parent == "": // no container's
	case err != nil:
		s.log.Warn("image is not served", "snapshot", sn.info.Name, "parent", sn.info.Parent, "why", err)
	case sn.lazy != nil:
		s.log.Info("image is served lazily", "image", sn.lazy.reference, "snapshot", sn.info.Name, "why", "erofsd has it mounted")
	default:
		s.log.Info("image is not served lazily", "image", sn.image, "snapshot", sn.info.Name, "parent", sn.info.Parent, "why", sn.why)
	}
}

// Mounts returns the mounts of an active snapshot or a view again.
func (s *Snapshotter) Mounts(ctx context.Context, key string) (m []mount.Mount, err error) {
	var sn snapshot
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		sn, err = find(ctx, key)
		return err
	})
	if err == nil {
		m, err = s.mounts(ctx, sn)
	}
	if err != nil {
		return nil, fmt.Errorf("mounts of snapshot %.200s: %w", key, err)
	}
	return m, nil
}

// create makes a snapshot: its directory first, and that has its name before the entry in
// the store is durable. What a crash leaves is a directory without an entry.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (sn snapshot, err error) {
	dir, err := s.newDirectory(kind)
	if err != nil {
		return sn, err
	}
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		if _, err := storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return err
		}
		if sn, err = find(ctx, key); err != nil {
			return err
		}
		if err := s.own(sn, dir); err != nil {
			return err
		}
		return s.place(ctx, dir, sn.ID)
	})
	return sn, s.placed(dir, err)
}

// place gives a new directory its name. It needs a write transaction with the entry of id: what
// has the name already is garbage, of a transaction that failed or a store that was removed,
// if no other entry has that number.
func (s *Snapshotter) place(ctx context.Context, dir, id string) error {
	failpoint.Hit("snapshotter.place")
	name := s.path(snapshotsDir, id)
	err := os.Rename(dir, name)
	if errors.Is(err, os.ErrExist) {
		if err := checkNumbers(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.path("metadata.db"), err)
		}
		if _, err = s.toTrash(id); err == nil {
			s.garbage.look()
			err = os.Rename(dir, name)
		}
	}
	failpoint.Hit("snapshotter.placed")
	return err
}

// placed ends what newDirectory began; err is what came of it.
func (s *Snapshotter) placed(dir string, err error) error {
	if err == nil {
		return nil
	}
	s.garbage.look() // by its name it may be another one's by now
	return errors.Join(err, os.RemoveAll(dir))
}

// newDirectory makes the directory of a snapshot that has no number yet.
func (s *Snapshotter) newDirectory(kind snapshots.Kind) (dir string, err error) {
	if dir, err = os.MkdirTemp(s.path(newDir), ""); err != nil {
		return "", err
	}
	err = os.Mkdir(filepath.Join(dir, "fs"), 0o755)
	if err == nil && kind == snapshots.KindActive {
		err = os.Mkdir(filepath.Join(dir, "work"), 0o711)
	}
	if err == nil {
		err = os.Chmod(filepath.Join(dir, "fs"), 0o755) // whatever the umask is
	}
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	failpoint.Hit("snapshotter.directory")
	return dir, nil
}

// own gives the root of a new snapshot in dir its owner: that which its labels map root to,
// else the parent's.
func (s *Snapshotter) own(sn snapshot, dir string) error {
	uid, gid, err := mappedRoot(sn.shifts())
	if err != nil {
		return err
	}
	if uid < 0 && len(sn.ParentIDs) > 0 {
		var st syscall.Stat_t
		if err := syscall.Stat(s.upper(sn.ParentIDs[0]), &st); err != nil {
			return fmt.Errorf("look at the parent's directory: %w", err)
		}
		uid, gid = int(st.Uid), int(st.Gid)
	}
	if uid < 0 {
		return nil
	}
	return os.Lchown(filepath.Join(dir, "fs"), uid, gid)
}

// ownAsImage gives the root of a new container the owner and mode that it has in the lazy
// image directly below it: the layer's own directory is not what is mounted.
func (s *Snapshotter) ownAsImage(sn snapshot) error {
	if sn.lazy == nil || sn.over > 0 || sn.Kind != snapshots.KindActive || kindOf(sn.info.Labels) == bootstrapLayer {
		return nil
	}
	var st syscall.Stat_t
	if err := syscall.Stat(s.point(sn.lazy.id), &st); err != nil {
		return fmt.Errorf("look at the image's root: %w", err)
	}
	upper := s.upper(sn.ID)
	if sn.shifts() == nil {
		if err := os.Lchown(upper, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	failpoint.Hit("snapshotter.own")
	return syscall.Chmod(upper, st.Mode&0o7777)
}
