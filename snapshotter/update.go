package snapshotter

import (
	"context"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// Update changes a snapshot's labels. What was decided by when the snapshot was made stays:
// without those labels, containers would be shown other files.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	info.Labels = publicLabels(info.Labels)
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		info.Labels = withDecision(info.Labels, old.Labels)
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		failpoint.Hit("snapshotter.update")
		return err
	})
	return updated, err
}

// deciding are the labels by which it is known what a snapshot is.
func deciding() []string {
	names := []string{labelTarget, labelBootstrap, labelBlob}
	for _, e := range elsewheres() {
		names = append(names, e.label)
	}
	return names
}

// withDecision returns labels with those of old that decide, and with no other ones.
func withDecision(labels, old map[string]string) map[string]string {
	same := func(name string) bool { return labels[name] == old[name] }
	if !slices.ContainsFunc(deciding(), func(name string) bool { return !same(name) }) {
		return labels
	}
	labels = maps.Clone(labels)
	if labels == nil {
		labels = map[string]string{}
	}
	for _, name := range deciding() {
		if v, ok := old[name]; ok {
			labels[name] = v
		} else {
			delete(labels, name)
		}
	}
	return labels
}

// asPrepared has a snapshot committed as what it was prepared as: a layer that was unpacked
// does not become one that is not here, whatever the client says then.
func asPrepared(prepared map[string]string) snapshots.Opt {
	return func(info *snapshots.Info) error {
		if kindOf(prepared) == bootstrapLayer {
			return kept(prepared)(info)
		}
		info.Labels = maps.Clone(info.Labels)
		for _, name := range deciding() {
			switch name {
			case labelTarget: // says which layer it is, and not what
			case labelBootstrap, labelBlob:
				if info.Labels[name] == "true" { // no other value decides, and explain tells it
					delete(info.Labels, name)
				}
			default:
				delete(info.Labels, name)
			}
		}
		return nil
	}
}
