package snapshotter

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
)

// A snapshot is one with what its mounts need.
type snapshot struct {
	storage.Snapshot
	info snapshots.Info

	lazy *lazyLayer // the nearest bootstrap below it; nil: none
	over int        // how many of its parents are over that
	data bool       // it lies on data whose bootstrap is not below it
	away string     // it lies on a layer whose files are elsewhere, as this says; "": it does not

	image, why string // of its parent: the reference, and what was decided by
}

// find returns the active snapshot or view called key. It needs a transaction.
func find(ctx context.Context, key string) (sn snapshot, err error) {
	if sn.Snapshot, err = storage.GetSnapshot(ctx, key); err != nil {
		return sn, err
	}
	if _, sn.info, _, err = storage.GetInfo(ctx, key); err != nil {
		return sn, err
	}
	return sn, sn.look(ctx)
}

// look walks down from the parent to the nearest bootstrap. The reference of the image may
// be a label of that, or of any layer below.
func (sn *snapshot) look(ctx context.Context) error {
	name := sn.info.Parent
	for name != "" && (sn.lazy == nil || sn.lazy.reference == "") {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return fmt.Errorf("parent %s: %w", name, err)
		}
		if sn.why == "" {
			sn.image = referenceIn(info.Labels)
			_, sn.why = decision(info.Labels)
		}
		switch {
		case sn.lazy != nil:
			sn.lazy.reference = referenceIn(info.Labels)
		case info.Labels[labelBootstrap] == "true":
			sn.lazy = &lazyLayer{id: id, chainID: info.Labels[labelTarget], reference: referenceIn(info.Labels)}
			sn.data = false
		case info.Labels[labelBlob] == "true":
			sn.data = true
		case sn.away == "":
			sn.away = filesElsewhere(info.Labels)
		}
		if sn.lazy == nil {
			sn.over++
		}
		name = info.Parent
	}
	return nil
}

// referenceIn returns the reference of an image that a label names; one that is too long is none.
func referenceIn(labels map[string]string) string {
	for _, name := range []string{labelReference, labelStargz} {
		if r := labels[name]; r != "" && len(r) <= maxReference {
			return r
		}
	}
	return ""
}
