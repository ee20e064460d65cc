package snapshotter

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// An elsewhere is a label by which nydus-snapshotter knew that the files of a layer are not in
// the layer's directory, and how it would have had them. Nothing of that is done here: a
// layer that has such a label was adopted with that snapshotter's root, and its directory is
// empty.
type elsewhere struct{ label, what string }

// elsewheres are all of them.
func elsewheres() []elsewhere {
	return []elsewhere{
		{"containerd.io/snapshot/nydus-proxy-mode", "the runtime in the guest was to pull it (proxy mode)"},
		{"containerd.io/snapshot/nydus-index-alternative", "a nydus image was found beside it in the registry"},
		{"containerd.io/snapshot/nydus-tarfs", "it was made a tarfs"},
		{"containerd.io/snapshot/stargz", "it was indexed as eStargz"},
	}
}

// filesElsewhere returns why the files of a committed layer are not in its directory; "": they are.
func filesElsewhere(labels map[string]string) (what string) {
	for _, e := range elsewheres() {
		if _, ok := labels[e.label]; ok {
			return e.what
		}
	}
	return ""
}

// errElsewhere is what those are told who want files that are elsewhere.
func errElsewhere(what string) error {
	return fmt.Errorf("nydus-snapshotter has pulled the image without its files (%s), and erofsd does not do so: remove the image and pull it again, then it is unpacked: %w",
		what, errdefs.ErrFailedPrecondition)
}

// labelTOC is what builders of eStargz images write to layers. They are ordinary ones too.
const labelTOC = "containerd.io/snapshot/stargz/toc.digest"
