package snapshotter

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
)

// maxReference bounds what is taken for an image's reference.
const maxReference = 4096

// An Image is one that can be served lazily: its layer with the bootstrap is here.
type Image struct {
	Snapshot   string // number of the snapshot with the bootstrap
	Dir        string // of that
	Mountpoint string
	Mounted    bool
	Failure    string // why it could not be mounted when it was wanted last; "": it could

	// What the daemon knows it as; "" before it was mounted for the first time.
	ID, DomainID string

	Reference string // that it was pulled by; "": not known
	Name      string // of the snapshot
}

// Images returns what can be served lazily. It does not ask the daemon.
func (s *Snapshotter) Images(ctx context.Context) (images []Image, err error) {
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted || info.Labels[labelBootstrap] != "true" {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			images = append(images, Image{Snapshot: id, Name: info.Name, Reference: referenceIn(info.Labels)})
			return err
		})
	})
	for n := range images {
		i := &images[n]
		i.Dir, i.Mountpoint = s.path(snapshotsDir, i.Snapshot), s.point(i.Snapshot)
		i.Failure = s.images.failure(i.Snapshot)
		r, err := readRecord(i.Dir)
		if err != nil {
			continue // it was never mounted, or who wants it is told
		}
		i.ID, i.DomainID, i.Mounted = r.Image, r.Domain, isImage(i.Mountpoint)
		if r.Reference != "" {
			i.Reference = r.Reference
		}
	}
	return images, err
}

// failure is why the image of a snapshot could not be mounted when it was wanted last.
func (m *images) failure(id string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failures[id]
}

// setFailure remembers how the last attempt to mount the image of a snapshot went.
func (m *images) setFailure(id string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		delete(m.failures, id)
		return
	}
	m.failures[id] = err.Error()
}
