package snapshotter

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// mounts returns what containerd mounts to see sn: the directory itself where there is only
// one, else an overlay. The image below it is mounted then.
func (s *Snapshotter) mounts(ctx context.Context, sn snapshot) ([]mount.Mount, error) {
	shifts := shiftOptions(sn.shifts())
	view := sn.Kind == snapshots.KindView
	switch {
	case kindOf(sn.info.Labels) == bootstrapLayer:
		// What is below has no files, and a bind mount has no limit of layers.
		return bind(s.upper(sn.ID), false, shifts), nil
	case sn.away != "":
		return nil, errElsewhere(sn.away)
	case sn.lazy != nil:
		point, err := s.mountImage(ctx, *sn.lazy)
		if err != nil {
			return nil, err
		}
		lower := append(s.uppers(sn.ParentIDs[:sn.over]), point)
		if view && len(lower) == 1 {
			lower = append(lower, s.upper(sn.ID)) // without an upper directory overlayfs wants two
		}
		return s.overlayOf(sn, lower, shifts), nil
	case sn.data:
		return nil, fmt.Errorf("a layer with data of a lazy image is none by itself: the layer with the image's metadata has to be the parent: %w", errdefs.ErrFailedPrecondition)
	case len(sn.ParentIDs) == 0:
		return bind(s.upper(sn.ID), view, shifts), nil
	case len(sn.ParentIDs) == 1 && view:
		return bind(s.upper(sn.ParentIDs[0]), true, shifts), nil
	}
	return s.overlayOf(sn, s.uppers(sn.ParentIDs), shifts), nil
}

// uppers returns the directories of snapshots.
func (s *Snapshotter) uppers(ids []string) []string {
	dirs := make([]string, 0, len(ids)+2)
	for _, id := range ids {
		dirs = append(dirs, s.upper(id))
	}
	return dirs
}

// shifts are the labels by which sn's ids are shifted. A layer's are as they are: such a
// label of it would be an annotation of the image.
func (sn snapshot) shifts() map[string]string {
	if sn.info.Labels[labelTarget] != "" {
		return nil
	}
	var shifts map[string]string
	for _, name := range []string{labelUIDMapping, labelGIDMapping} {
		if v, ok := sn.info.Labels[name]; ok {
			if shifts == nil {
				shifts = map[string]string{}
			}
			shifts[name] = v
		}
	}
	return shifts
}

// shiftOptions returns the mount options of a snapshot whose ids are shifted. They are for
// containerd, which makes the mounts (its capability remap-ids).
func shiftOptions(shifts map[string]string) (options []string) {
	if m, ok := shifts[labelUIDMapping]; ok {
		options = append(options, "uidmap="+m)
	}
	if m, ok := shifts[labelGIDMapping]; ok {
		options = append(options, "gidmap="+m)
	}
	return options
}

func bind(dir string, readOnly bool, options []string) []mount.Mount {
	mode := "rw"
	if readOnly {
		mode = "ro"
	}
	return []mount.Mount{{Type: "bind", Source: dir, Options: append(options, mode, "rbind")}}
}

// overlayOf returns the overlay of sn over directories, the uppermost first.
func (s *Snapshotter) overlayOf(sn snapshot, lower, options []string) []mount.Mount {
	if sn.Kind == snapshots.KindActive {
		if _, ok := sn.info.Labels[labelVolatile]; ok && sn.info.Labels[labelTarget] == "" {
			options = append(options, "volatile")
		}
		options = append(options, "workdir="+s.path(snapshotsDir, sn.ID, "work"), "upperdir="+s.upper(sn.ID))
	}
	options = append(options, "lowerdir="+strings.Join(lower, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, s.overlay...)}}
}
