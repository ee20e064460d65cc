package containerd

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// commit makes an image of what a container of a lazy image has written, as nerdctl commit
// does, and runs it: here, and pulled from where it was pushed to. It stays lazy.
func (n *node) commit(t *testing.T) {
	ctx, done, err := n.WithLease(in(t, "a"))
	if err != nil {
		t.Fatal(err)
	}
	image := n.pull(ctx, t, n.w.lazy, false)
	c, err := n.runArgs(ctx, image, "writer", "write", "/note", "committed")
	if err != nil {
		t.Fatal(err)
	}
	<-c.exit
	reference := n.w.addr + "/app:committed"
	committed := n.commitAs(ctx, t, image, c.ID(), reference)
	if got, err := c.finish(ctx); err != nil || got != "" {
		t.Errorf("the writer printed %q, %v", got, err)
	}
	if err := committed.Unpack(ctx, snapshotterName); err != nil {
		t.Fatal(err)
	}
	n.prints(ctx, t, committed, "reads-note", "committed\n", "show", "/note")
	n.check(ctx, t, committed, "reads-all")
	if err := n.Push(ctx, reference, committed.Target(), client.WithResolver(resolver())); err != nil {
		t.Fatal(err)
	}
	if err := done(ctx); err != nil {
		t.Error(err)
	}
	ctx = in(t, "a")
	n.remove(ctx, t, n.w.lazy, reference)
	n.collect(ctx, t)
	n.empty(ctx, t)
	pulled := n.pull(ctx, t, reference, false)
	if n.dataPulled(ctx, t, pulled) {
		t.Error("a layer with data was pulled")
	}
	n.prints(ctx, t, pulled, "reads-pulled-note", "committed\n", "show", "/note")
	n.check(ctx, t, pulled, "reads-all-pulled")
}

// commitAs makes an image of another one and the writable layer over it.
func (n *node) commitAs(ctx context.Context, t *testing.T, image client.Image, key, reference string) client.Image {
	t.Helper()
	diff, err := rootfs.CreateDiff(ctx, key, n.SnapshotService(snapshotterName), n.DiffService())
	if err != nil {
		t.Fatal(err)
	}
	info, err := n.ContentStore().Info(ctx, diff.Digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.Spec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.Digest(info.Labels[labels.LabelUncompressed]))
	m := n.manifest(ctx, t, image)
	m.Layers = append(m.Layers, diff)
	m.Config = n.write(ctx, t, newBlob(m.Config.MediaType, marshal(t, config)), nil)
	refs := map[string]string{"containerd.io/gc.ref.content.config": m.Config.Digest.String()}
	for i, l := range m.Layers {
		refs[fmt.Sprint("containerd.io/gc.ref.content.l.", i)] = l.Digest.String()
	}
	target := n.write(ctx, t, newBlob(ocispec.MediaTypeImageManifest, marshal(t, m)), refs)
	made, err := n.ImageService().Create(ctx, images.Image{Name: reference, Target: target})
	if err != nil {
		t.Fatal(err)
	}
	return client.NewImage(n.Client, made)
}

// write puts a blob into containerd's store of content.
func (n *node) write(ctx context.Context, t *testing.T, b blob, labels map[string]string) ocispec.Descriptor {
	t.Helper()
	err := content.WriteBlob(ctx, n.ContentStore(), b.Digest.String(), bytes.NewReader(b.body), b.Descriptor, content.WithLabels(labels))
	if err != nil {
		t.Fatal(err)
	}
	return b.Descriptor
}
