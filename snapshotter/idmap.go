package snapshotter

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Labels of a snapshot whose ids are shifted: CONTAINER:HOST:LENGTH, several with commas.
const (
	labelUIDMapping = snapshots.LabelSnapshotUIDMapping
	labelGIDMapping = snapshots.LabelSnapshotGIDMapping
)

// mappedRoot returns the ids on the host of the container's root, or -1 without a mapping.
func mappedRoot(labels map[string]string) (uid, gid int, err error) {
	if uid, err = mapRoot(labels, labelUIDMapping); err != nil {
		return 0, 0, err
	}
	if gid, err = mapRoot(labels, labelGIDMapping); err != nil {
		return 0, 0, err
	}
	if (uid < 0) != (gid < 0) { // the other one is as it is
		uid, gid = max(uid, 0), max(gid, 0)
	}
	return uid, gid, nil
}

// mapRoot returns what the mapping in a label maps 0 to; -1 when there is no such label. All
// of the mapping must be one: it becomes a mount option as it is.
func mapRoot(labels map[string]string, label string) (int, error) {
	text, ok := labels[label]
	if !ok {
		return -1, nil
	}
	root := -1
	for part := range strings.SplitSeq(text, ",") {
		container, host, length, err := parseMapping(part)
		if err != nil {
			return 0, fmt.Errorf("label %s: %w: %w", label, err, errdefs.ErrInvalidArgument)
		}
		if container == 0 && length > 0 && root < 0 {
			root = int(host)
		}
	}
	if root >= 0 {
		return root, nil
	}
	return 0, fmt.Errorf("label %s: %.100q does not map root: %w", label, text, errdefs.ErrInvalidArgument)
}

func parseMapping(text string) (container, host, length uint32, err error) {
	fields := strings.Split(text, ":")
	if len(fields) != 3 {
		return 0, 0, 0, fmt.Errorf("%.100q is no mapping, want CONTAINER:HOST:LENGTH", text)
	}
	for i, to := range []*uint32{&container, &host, &length} {
		n, err := strconv.ParseUint(fields[i], 10, 32)
		if err != nil || n == math.MaxUint32 { // which is no id
			return 0, 0, 0, fmt.Errorf("%.100q is no mapping: %.20q is no id", text, fields[i])
		}
		*to = uint32(n)
	}
	return container, host, length, nil
}
