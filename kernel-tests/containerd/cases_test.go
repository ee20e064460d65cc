package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// clean removes everything, and waits until it is gone.
func (n *node) clean(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), bound)
	defer cancel()
	if t.Failed() {
		n.clear(t)
	}
	for _, name := range spaces {
		ctx := namespaces.WithNamespace(ctx, name)
		list, err := n.ImageService().List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, i := range list {
			n.remove(ctx, t, i.Name)
		}
		n.collect(ctx, t)
	}
	n.empty(ctx, t)
}

// wholeLife pulls an image, runs a container, executes something in it while it runs, and removes
// everything, twice.
func (n *node) wholeLife(t *testing.T) {
	ctx := in(t, "a")
	for i := range 2 {
		image := n.pull(ctx, t, n.w.lazy, false)
		if n.dataPulled(ctx, t, image) {
			t.Error("a layer with data was pulled")
		}
		c := n.waiting(ctx, t, image, fmt.Sprint("life-", i))
		if got, err := c.exec(ctx, "read", "/bin/check"); err != nil || got != n.w.want {
			t.Errorf("what was executed printed %q, %v; want %q", got, err, n.w.want)
		}
		n.finished(ctx, t, c)
		n.remove(ctx, t, n.w.lazy)
		n.empty(ctx, t)
	}
}

// many runs twenty containers of one image at once.
func (n *node) many(t *testing.T) {
	ctx := in(t, "a")
	image := n.pull(ctx, t, n.w.lazy, false)
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			c, err := n.run(ctx, image, fmt.Sprint("many-", i), false)
			if err != nil {
				t.Error(err)
				return
			}
			if got, err := c.finish(ctx); err != nil || got != n.w.want {
				t.Errorf("container %d printed %q, %v", i, got, err)
			}
		})
	}
	all.Wait()
	st, err := n.daemon.Status(ctx)
	if err != nil || len(st.Images) != 1 {
		t.Errorf("%d images are mounted for all containers, %v", len(st.Images), err)
	}
}

// sharing reads two images that have layers in common: these are fetched once. Then the first
// goes, and the other one is read again.
func (n *node) sharing(t *testing.T) {
	ctx := in(t, "a")
	first := n.pull(ctx, t, n.w.lazy, false)
	shared, before := n.dataLayers(ctx, t, first), n.fetched(ctx, t, first)
	n.check(ctx, t, first, "first")
	second := n.pull(ctx, t, n.w.other, false)
	theirs := map[string]bool{}
	for _, l := range n.dataLayers(ctx, t, second) {
		theirs[l.Digest.String()] = true
	}
	n.check(ctx, t, second, "second")
	for i, l := range shared {
		if !theirs[l.Digest.String()] {
			t.Fatalf("the images do not share %s", l.Digest)
		}
		if got := n.w.front.fetched(l.Digest) - before[i]; got == 0 || got > l.Size+l.Size/4 {
			t.Errorf("%d bytes of a blob of %d were fetched for two images", got, l.Size)
		}
	}
	n.remove(ctx, t, n.w.lazy)
	n.collect(ctx, t)
	n.check(ctx, t, second, "second-again")
}

// removed removes the image below a container that has read nothing yet.
func (n *node) removed(t *testing.T) {
	ctx := in(t, "a")
	c := n.waiting(ctx, t, n.pull(ctx, t, n.w.lazy, false), "outlives-its-image")
	n.remove(ctx, t, n.w.lazy)
	n.collect(ctx, t)
	n.finished(ctx, t, c)
	n.collect(ctx, t)
	n.empty(ctx, t)
}

// namespaces pulls one image in two: each has containers of it, and the second goes on when
// the first has removed it.
func (n *node) namespaces(t *testing.T) {
	a, b := in(t, "a"), in(t, "b")
	first := n.pull(a, t, n.w.lazy, false)
	before := n.fetched(a, t, first)
	n.check(a, t, first, "same")
	second := n.pull(b, t, n.w.lazy, false)
	c := n.waiting(b, t, second, "same")
	n.remove(a, t, n.w.lazy)
	n.collect(a, t)
	n.finished(b, t, c)
	n.check(b, t, second, "same-again")
	for i, l := range n.dataLayers(b, t, second) {
		if got := n.w.front.fetched(l.Digest) - before[i]; got == 0 || got > l.Size+l.Size/4 {
			t.Errorf("%d bytes of a blob of %d were fetched for both namespaces", got, l.Size)
		}
	}
}

// references pulls one manifest by two references, and goes on with the second when the first
// is removed.
func (n *node) references(t *testing.T) {
	ctx := in(t, "a")
	first := n.pull(ctx, t, n.w.lazy, false)
	n.check(ctx, t, first, "by-first")
	second := n.pull(ctx, t, n.w.again, false)
	if first.Target().Digest != second.Target().Digest {
		t.Fatal("the references are of different manifests")
	}
	c := n.waiting(ctx, t, second, "by-second")
	n.remove(ctx, t, n.w.lazy)
	n.collect(ctx, t)
	n.finished(ctx, t, c)
	n.check(ctx, t, second, "by-second-again")
}

// race removes the image when the first of its containers is made and others are about to be,
// and has garbage collected while another image is pulled: what starts reads the right bytes,
// and nothing is left.
func (n *node) race(t *testing.T) {
	ctx := in(t, "a")
	for i := range 4 {
		image := n.pull(ctx, t, n.w.lazy, false)
		var ended atomic.Int32
		var all sync.WaitGroup
		for j := range 3 {
			all.Go(func() {
				defer ended.Add(1)
				c, err := n.run(ctx, image, fmt.Sprint("race-", i, "-", j), false)
				if err != nil {
					t.Logf("round %d: %v", i, err) // the image was gone
					return
				}
				if got, err := c.finish(ctx); err != nil || got != n.w.want {
					t.Errorf("round %d: a container printed %q, %v", i, got, err)
				}
			})
		}
		all.Go(func() {
			if _, err := n.tryPull(ctx, n.w.other, false); err != nil {
				t.Errorf("pull while garbage is collected: %v", err)
			}
		})
		n.await(t, "a container is made", func() error {
			made, err := n.Containers(ctx)
			if err == nil && len(made) == 0 && ended.Load() == 0 {
				err = errors.New("there is none")
			}
			return err
		})
		n.remove(ctx, t, n.w.lazy)
		n.collect(ctx, t)
		all.Wait()
		n.clear(t)
		n.remove(ctx, t, n.w.other)
	}
}

// usageByCtr asks ctr what the image takes, before and after a container has read it, and what
// a container takes that has written.
func (n *node) usageByCtr(t *testing.T) {
	ctx := in(t, "a")
	image := n.pull(ctx, t, n.w.lazy, false)
	key := n.chain(ctx, t, image)
	before := n.ctrUsage(ctx, t, key)
	c, err := n.runArgs(ctx, image, "writer", "write", "/data/more", strings.Repeat("x", 100_000))
	if err != nil {
		t.Fatal(err)
	}
	<-c.exit
	if got := n.ctrUsage(ctx, t, "writer"); got < 100_000 || got > 1_000_000 {
		t.Errorf("a container that has written 100 kB takes %d bytes", got)
	}
	if _, err := c.finish(ctx); err != nil {
		t.Error(err)
	}
	n.check(ctx, t, image, "reader")
	if after := n.ctrUsage(ctx, t, key); before > 1_000_000 || after < 8_000_000 {
		t.Errorf("the image took %d bytes before it was read, and %d afterwards", before, after)
	}
}

// fetched is how many bytes of each layer with data were fetched so far.
func (n *node) fetched(ctx context.Context, t *testing.T, image client.Image) (bytes []int64) {
	t.Helper()
	for _, l := range n.dataLayers(ctx, t, image) {
		bytes = append(bytes, n.w.front.fetched(l.Digest))
	}
	return bytes
}

// ctrUsage is what ctr says that a snapshot takes, in bytes.
func (n *node) ctrUsage(ctx context.Context, t *testing.T, key string) int64 {
	t.Helper()
	out := n.w.runtime.Ctr(ctx, t, n.socket(), "a", "snapshots", "--snapshotter", snapshotterName, "usage", "-b", key)
	for line := range strings.Lines(out) { // KEY SIZE INODES
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == key {
			size, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return size
		}
	}
	t.Fatalf("ctr says nothing of %s:\n%s", key, out)
	return 0
}

// view mounts a view of the image and a writable snapshot of it, and compares the files.
func (n *node) view(t *testing.T) {
	ctx, done, err := n.WithLease(in(t, "a")) // else containerd collects what no container has
	if err != nil {
		t.Fatal(err)
	}
	chain := n.chain(ctx, t, n.pull(ctx, t, n.w.lazy, false))
	snapshots := n.SnapshotService(snapshotterName)
	for key, writable := range map[string]bool{"view": false, "prepare": true} {
		taken := snapshots.View
		if writable {
			taken = snapshots.Prepare
		}
		mounts, err := taken(ctx, key, chain)
		if err != nil {
			t.Fatal(err)
		}
		dir := n.point(t, key)
		if err := mount.All(mounts, dir); err != nil {
			t.Fatal(err)
		}
		n.compare(t, dir, writable)
		if err := errors.Join(mount.UnmountAll(dir, 0), snapshots.Remove(ctx, key)); err != nil {
			t.Error(err)
		}
	}
	if err := done(ctx); err != nil {
		t.Error(err)
	}
}

// mounted has ctr mount the image, as it is and to be written. That of containerd 1.6 does so
// only with overlayfs, whatever it is told.
func (n *node) mounted(t *testing.T) {
	ctx := in(t, "a")
	n.pull(ctx, t, n.w.lazy, false)
	for _, writable := range []bool{false, true} {
		dir := n.point(t, fmt.Sprint("mounted-", writable))
		n.w.runtime.Ctr(ctx, t, n.socket(), "a", "images", "mount", "--snapshotter", snapshotterName, fmt.Sprint("--rw=", writable), n.w.lazy, dir)
		n.compare(t, dir, writable)
		n.w.runtime.Ctr(ctx, t, n.socket(), "a", "images", "unmount", "--rm", "--snapshotter", snapshotterName, dir)
	}
}

// point makes a directory where nothing is mounted when t ends.
func (n *node) point(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(n.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// compare compares what is mounted at dir with what the images have.
func (n *node) compare(t *testing.T, dir string, writable bool) {
	t.Helper()
	same(t, filepath.Join(n.w.dir, "src", "files", "data"), filepath.Join(dir, "data"))
	if err := os.WriteFile(filepath.Join(dir, "data", "new"), nil, 0o600); (err == nil) != writable {
		t.Errorf("write there: %v", err)
	}
}

// ordinary runs an image that is not lazy.
func (n *node) ordinary(t *testing.T) {
	ctx := in(t, "a")
	image := n.pull(ctx, t, n.w.plain, false)
	n.check(ctx, t, image, "ordinary")
	c := n.waiting(ctx, t, image, "outlives-its-image")
	n.remove(ctx, t, n.w.plain)
	n.collect(ctx, t)
	n.finished(ctx, t, c)
}

// deep runs an ordinary image with many layers.
func (n *node) deep(t *testing.T) {
	ctx := in(t, "a")
	image := n.pull(ctx, t, n.w.deep, false)
	n.check(ctx, t, image, "deep")
	n.prints(ctx, t, image, "deep-count", fmt.Sprintln(manyLayers-2), "count", "/deep")
}

// shifted runs a container in a user namespace of its own: the files are its root's, and
// nobody has copied them for that.
func (n *node) shifted(t *testing.T) {
	ctx := in(t, "a")
	image := n.pull(ctx, t, n.w.lazy, false)
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100_000, Size: 65536}}
	for i, args := range [][]string{{"owner", "/data/00"}, nil} {
		id := fmt.Sprint("shifted-", i)
		c, err := n.runNew(ctx, id, client.WithNewSnapshot(id, image, client.WithUserNSRemapperLabels(ids, ids)),
			oci.WithUserNamespace(ids, ids), oci.WithProcessArgs(append([]string{"/bin/check"}, args...)...))
		if err != nil {
			t.Fatal(err)
		}
		if info, err := n.SnapshotService(snapshotterName).Stat(ctx, id); err != nil || info.Parent != n.chain(ctx, t, image) {
			t.Errorf("its files are over %s and not over the image: %v", info.Parent, err)
		}
		want := []string{"0 0\n", n.w.want}[i]
		if got, err := c.finish(ctx); err != nil || got != want {
			t.Errorf("%q printed %q, %v; want %q", args, got, err, want)
		}
	}
}
