package snapshotter

import (
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Labels that come with a layer. Those below containerd.io/snapshot/ may also be
// annotations of the image, written by anybody.
const (
	// labelTarget names the layer that is unpacked: its chain id. No container has it.
	labelTarget = snapshots.LabelSnapshotRef

	labelBlob      = "containerd.io/snapshot/nydus-blob"       // "true": data
	labelBootstrap = "containerd.io/snapshot/nydus-bootstrap"  // "true": metadata
	labelVersion   = "containerd.io/snapshot/nydus-fs-version" // of the metadata
	labelReference = "containerd.io/snapshot/cri.image-ref"    // of the image, from who pulls
	labelStargz    = "containerd.io/snapshot/remote/stargz.reference"
	labelVolatile  = "containerd.io/snapshot/overlay.volatile" // the container's files need not survive a crash

	// A login, from clients of nydus-snapshotter, or from anybody's annotation. It is neither
	// used nor kept: containerd has written it to its own database by now, in clear.
	labelPullUser   = "containerd.io/snapshot/pullusername"
	labelPullSecret = "containerd.io/snapshot/pullsecret"
)

// A kind of layer says what Prepare does with it.
type layerKind int

const (
	otherLayer     layerKind = iota // containerd unpacks it; or no layer of an image at all
	dataLayer                       // stays where it is; the daemon fetches what is read
	bootstrapLayer                  // containerd unpacks it, and the daemon mounts it
)

// kindOf says what is prepared with these labels. Only a layer that is being unpacked
// has a target: a pod's annotations can put the other labels on a container's snapshot.
func kindOf(labels map[string]string) layerKind {
	switch {
	case labels[labelTarget] == "":
		return otherLayer
	case labels[labelBootstrap] == "true":
		return bootstrapLayer
	case labels[labelBlob] == "true":
		return dataLayer
	}
	return otherLayer
}

// labelsOf returns the labels that options set.
func labelsOf(opts []snapshots.Opt) (map[string]string, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	return info.Labels, nil
}

// withoutLogin takes logins out of the labels that options set.
func withoutLogin(opts []snapshots.Opt) []snapshots.Opt {
	return append(slices.Clip(opts), func(info *snapshots.Info) error {
		info.Labels = publicLabels(info.Labels)
		return nil
	})
}

// publicLabels returns labels without logins; the argument stays as it is.
func publicLabels(labels map[string]string) map[string]string {
	_, user := labels[labelPullUser]
	_, secret := labels[labelPullSecret]
	if !user && !secret {
		return labels
	}
	labels = maps.Clone(labels)
	delete(labels, labelPullUser)
	delete(labels, labelPullSecret)
	return labels
}

// checkVersion refuses metadata that the kernel cannot mount, before it is fetched.
func checkVersion(labels map[string]string) error {
	if v := labels[labelVersion]; v != "" && v != "6" {
		return fmt.Errorf("the image has RAFS version %.20q and the kernel mounts only 6; convert it again: %w", v, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// checkReference refuses a reference that cannot be one: it is kept with the image.
func checkReference(labels map[string]string) error {
	for _, name := range []string{labelReference, labelStargz} {
		if n := len(labels[name]); n > maxReference {
			return fmt.Errorf("the image's reference (%s) has %d bytes, more than the %d that one can have: %w", name, n, maxReference, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// kept are the labels of a layer with a bootstrap that must be known when it is committed,
// whatever the client says of it then.
func kept(prepared map[string]string) snapshots.Opt {
	return func(info *snapshots.Info) error {
		info.Labels = maps.Clone(info.Labels)
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		info.Labels[labelBootstrap] = "true"
		for _, name := range []string{labelTarget, labelReference, labelStargz} {
			v, ok := prepared[name]
			if _, said := info.Labels[name]; ok && !said {
				info.Labels[name] = v
			}
		}
		return nil
	}
}
