package containerd

import (
	"context"
	"runtime"
	"testing"

	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// transfer pulls by containerd's transfer service.
func (n *node) transfer(t *testing.T) {
	ctx := in(t, "a")
	for _, reference := range []string{n.w.lazy, n.w.plain} {
		source, err := registry.NewOCIRegistry(ctx, reference)
		if err != nil {
			t.Fatal(err)
		}
		here := ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
		if err := n.Transfer(ctx, source, image.NewStore(reference, image.WithUnpack(here, snapshotterName))); err != nil {
			t.Fatalf("transfer %s: %v", reference, err)
		}
		n.transferred(ctx, t, reference, "transfer")
		n.remove(ctx, t, reference)
	}
}

// pullByCtr has ctr pull, which leaves it to that service.
func (n *node) pullByCtr(t *testing.T) {
	ctx := in(t, "a")
	n.w.runtime.Ctr(ctx, t, n.socket(), "a", "images", "pull", "--plain-http", "--snapshotter", snapshotterName, n.w.lazy)
	n.transferred(ctx, t, n.w.lazy, "by-ctr")
}

// transferred runs an image that was pulled already, and unpacked: if it is lazy, its data are
// not there.
func (n *node) transferred(ctx context.Context, t *testing.T, reference, id string) {
	t.Helper()
	pulled, err := n.GetImage(ctx, reference)
	if err != nil {
		t.Fatal(err)
	}
	if reference == n.w.lazy && n.dataPulled(ctx, t, pulled) {
		t.Errorf("a layer with data of %s was pulled", reference)
	}
	if there, err := pulled.IsUnpacked(ctx, snapshotterName); err != nil || !there {
		t.Errorf("%s is unpacked: %v, %v", reference, there, err)
	}
	n.check(ctx, t, pulled, id)
}
