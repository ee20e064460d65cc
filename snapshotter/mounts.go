package snapshotter

import (
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
)

// mounts returns what containerd mounts to see sn: the directory itself where there is only
// one, else an overlay.
func (s *Snapshotter) mounts(sn snapshot) []mount.Mount {
	var lower []string
	for _, id := range sn.ParentIDs {
		lower = append(lower, s.upper(id))
	}
	shifts := shifted(sn.info.Labels)
	switch {
	case len(lower) == 0:
		return bind(s.upper(sn.ID), sn.Kind == snapshots.KindView, shifts)
	case len(lower) == 1 && sn.Kind == snapshots.KindView:
		return bind(lower[0], true, shifts)
	}
	return s.overlayOf(sn, lower, shifts)
}

// shifted returns the mount options of a snapshot whose ids are shifted. They are for
// containerd, which makes the mounts (its capability remap-ids).
func shifted(labels map[string]string) (options []string) {
	if m, ok := labels[labelUIDMapping]; ok {
		options = append(options, "uidmap="+m)
	}
	if m, ok := labels[labelGIDMapping]; ok {
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
		options = append(options, "workdir="+s.path(snapshotsDir, sn.ID, "work"), "upperdir="+s.upper(sn.ID))
	}
	options = append(options, "lowerdir="+strings.Join(lower, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, s.overlay...)}}
}
