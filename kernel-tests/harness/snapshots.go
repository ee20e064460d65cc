package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/snapshotter"
)

// Locally is a source of images whose reference is the directory of their blobs.
func Locally(_ context.Context, dir string) (snapshotter.Origin, error) {
	type object = map[string]any
	text, err := json.Marshal(object{"version": 2, "backend": object{"type": "localfs", "localfs": object{"dir": dir}}})
	return snapshotter.Origin{Config: text}, err
}

// Labels of a layer, as containerd's clients set them.
const (
	labelBlob      = "containerd.io/snapshot/nydus-blob"
	labelBootstrap = "containerd.io/snapshot/nydus-bootstrap"
	labelReference = "containerd.io/snapshot/cri.image-ref"
)

// PullLocal does what containerd does when it pulls a lazy image of one layer with data, which
// lies in a directory for [Locally]. It returns the image's snapshots, the uppermost first.
func PullLocal(ctx context.Context, sn snapshots.Snapshotter, name string, r api.MountRequest) ([]string, error) {
	data, top := "data-"+name, "boot-"+name
	labels := func(target, kind string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: target, kind: "true", labelReference: r.BlobDir})
	}
	_, err := sn.Prepare(ctx, "extract-"+data, "", labels(data, labelBlob))
	if !errdefs.IsAlreadyExists(err) {
		return nil, fmt.Errorf("the layer with data of %s does not stay where it is: %w", name, err)
	}
	mounts, err := sn.Prepare(ctx, "extract-"+top, data, labels(top, labelBootstrap))
	if err != nil {
		return nil, err
	}
	boot, err := os.ReadFile(r.Bootstrap)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(mounts[0].Source, "image", "image.boot") // a bind mount
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, boot, 0o600)); err != nil {
		return nil, err
	}
	return []string{top, data}, sn.Commit(ctx, top, "extract-"+top, labels(top, labelBootstrap))
}
