package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// above is what containerd has above the snapshotter: its own metadata.
type above struct {
	snapshots.Snapshotter
	db *metadata.DB
}

// newAbove is a containerd that knows nothing.
func newAbove(t *testing.T, r *lazyRig) above {
	t.Helper()
	db, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	m := metadata.NewDB(db, nil, map[string]snapshots.Snapshotter{"erofsd": r}) // whichever r has
	return above{m.Snapshotter("erofsd"), m}
}

// TestImageVolume has a lazy image as kubelet's image volumes and the copy of volumes have it:
// read-only, by a view or by "ro" behind the mounts of a container; shifted, too.
func TestImageVolume(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "a volume"))
	view, err := r.View(t.Context(), "view", top)
	if err != nil {
		t.Fatal(err)
	}
	copied, err := r.Prepare(t.Context(), "copied", top)
	if err != nil {
		t.Fatal(err)
	}
	for i := range copied {
		copied[i].Options = append(copied[i].Options, "ro")
	}
	for name, m := range map[string][]mount.Mount{"view": view, "copied": copied} {
		if text, writable := readIn(t, m); text != "a volume" || writable {
			t.Errorf("%s: it reads %q, can be written: %v", name, text, writable)
		}
	}
	shifted, err := r.View(t.Context(), "shifted", top, snapshots.WithLabels(map[string]string{labelUIDMapping: "0:100000:65536", labelGIDMapping: "0:100000:65536"}))
	m := only(t, shifted, err)
	dir := t.TempDir()
	if err := mount.All([]mount.Mount{m}, dir); err != nil {
		t.Fatalf("%+v: %v", m, err)
	}
	defer func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(dir, "hello"), &st); err != nil || st.Uid != 100000 || st.Gid != 100000 {
		t.Errorf("a file of root belongs to %d:%d, %v; want 100000:100000", st.Uid, st.Gid, err)
	}
	if err := r.Commit(t.Context(), "committed", "view"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit of a view: %v", err)
	}
}

// TestUnpackView looks at the bootstrap layer while it is unpacked, and at the layers of a
// lazy image by themselves, as builders do.
func TestUnpackView(t *testing.T) {
	r := newLazy(t)
	if _, err := r.Prepare(t.Context(), "extract-1", "", with("sha256:data", labelBlob, "true")); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	first := prepare(t, r.Snapshotter, "extract-2", "sha256:data", with("sha256:top", labelBootstrap, "true"))
	again, err := r.Mounts(t.Context(), "extract-2")
	if m := only(t, again, err); m.Type != "bind" || !reflect.DeepEqual(m, first) {
		t.Errorf("while it is unpacked it is mounted by %+v, then by %+v", first, m)
	}
	if n := r.daemon.count("bind"); n != 0 {
		t.Error("the daemon was told of an image that is being unpacked")
	}
	if _, err := r.View(t.Context(), "look", "sha256:data"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "metadata") {
		t.Errorf("a view of a layer with data: %v", err)
	}
	if _, err := r.View(t.Context(), "look", "extract-2"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a view of what is being unpacked: %v", err)
	}
}

// TestMaxSize has hints of a size, sensible ones and others: they are no limit here, and harm
// nobody.
func TestMaxSize(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "sized"))
	for i, size := range []string{"268435456", "1", "0", "-1", "", "lots", strings.Repeat("9", 4000)} {
		m, err := r.Prepare(t.Context(), "c"+strconv.Itoa(i), top, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: size}))
		if err != nil {
			t.Errorf("%.20q: %v", size, err)
			continue
		}
		if text, writable := readIn(t, m); text != "sized" || !writable {
			t.Errorf("%.20q: it reads %q, can be written: %v", size, text, writable)
		}
	}
}

// TestManyLayers has an image of 128 layers, a container of it and a layer on top: the layers
// of data are no layers of the overlay.
func TestManyLayers(t *testing.T) {
	r := newLazy(t)
	parent := ""
	for i := range 127 {
		chain := "sha256:layer-" + strconv.Itoa(i)
		if _, err := r.Prepare(t.Context(), "extract "+chain, parent, with(chain, labelBlob, "true")); !errdefs.IsAlreadyExists(err) {
			t.Fatalf("layer %d: %v", i, err)
		}
		parent = chain
	}
	top := pullOver(t, r, "1", parent, bootstrapOf(t, "under 127"))
	m := prepare(t, r.Snapshotter, "c", top)
	if text, writable := readIn(t, []mount.Mount{m}); text != "under 127" || !writable {
		t.Errorf("it reads %q, can be written: %v", text, writable)
	}
	if n := strings.Count(strings.Join(m.Options, " "), "/snapshots/"); n != 3 {
		t.Errorf("%d directories of snapshots are mounted, want 3: %q", n, m.Options)
	}
}

// pullOver unpacks a bootstrap layer over another one.
func pullOver(t *testing.T, r *lazyRig, image, parent string, boot []byte) (top string) {
	t.Helper()
	top = "sha256:top-" + image
	m := prepare(t, r.Snapshotter, "extract "+top, parent, with(top, labelBootstrap, "true"))
	if err := os.WriteFile(filepath.Join(m.Source, "image.boot"), boot, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(t.Context(), top, "extract "+top, with(top, labelBootstrap, "true")); err != nil {
		t.Fatal(err)
	}
	return top
}

// TestMountsAgain asks for the mounts again and again, also after a restart: they are the same,
// and the daemon does not mount the image again.
func TestMountsAgain(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "again"))
	first := prepare(t, r.Snapshotter, "c", top)
	for range 2 {
		for range 3 {
			m, err := r.Mounts(t.Context(), "c")
			if err != nil || !reflect.DeepEqual(only(t, m, err), first) {
				t.Errorf("mounts are %+v, %v; they were %+v", m, err, first)
			}
		}
		r.restart(t)
	}
	if n := r.daemon.count("mount"); n != 1 {
		t.Errorf("the image was mounted %d times", n)
	}
	if _, err := r.Mounts(t.Context(), top); !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
		t.Errorf("mounts of a committed snapshot: %v", err)
	}
}

// TestTwoReferences has one manifest by two references, in two namespaces: it is one image, and
// stays as long as one of them does.
func TestTwoReferences(t *testing.T) {
	r := newLazy(t)
	up := newAbove(t, r)
	a, b := namespaces.WithNamespace(t.Context(), "a"), namespaces.WithNamespace(t.Context(), "b")
	boot := bootstrapOf(t, "one manifest")
	for ctx, reference := range map[context.Context]string{a: "one.example/app:1", b: "two.example/app:1"} {
		top := pull(ctx, t, up, "1", boot, labelReference, reference)
		m, err := up.Prepare(ctx, "c", top, inUse())
		if err != nil {
			t.Fatal(err)
		}
		if text, _ := readIn(t, m); text != "one manifest" {
			t.Errorf("by %s it reads %q", reference, text)
		}
	}
	if n := len(r.daemon.kept); n != 1 {
		t.Errorf("the daemon has %d images, want 1", n)
	}
	for _, key := range []string{"c", "sha256:boot-1", "sha256:data-1"} {
		if err := up.Remove(a, key); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, up, r)
	m, err := up.Prepare(b, "d", "sha256:boot-1", inUse())
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != "one manifest" {
		t.Errorf("after one reference was removed the other reads %q", text)
	}
	for _, key := range []string{"c", "d", "sha256:boot-1", "sha256:data-1"} {
		if err := up.Remove(b, key); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, up, r)
	if !r.daemon.empty() || len(names(t, r.root, snapshotsDir)) > 0 {
		t.Errorf("the daemon has %+v", r.daemon)
	}
}

// inUse keeps containerd's garbage collection from a snapshot and its parents.
func inUse() snapshots.Opt {
	return snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "in use"})
}

// collect collects containerd's garbage, and ours.
func collect(t *testing.T, up above, r *lazyRig) {
	t.Helper()
	_, err := up.db.GarbageCollect(t.Context())
	if err = errors.Join(err, r.Cleanup(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// TestContainerdWiped has containerd's metadata removed while ours stay: what nobody knows any
// more goes with the next collection, and images can be pulled and run meanwhile and after.
func TestContainerdWiped(t *testing.T) {
	r := newLazy(t)
	ctx := namespaces.WithNamespace(t.Context(), "a")
	boot := bootstrapOf(t, "pulled again")
	up := newAbove(t, r)
	if _, err := up.Prepare(ctx, "c", pull(ctx, t, up, "1", boot)); err != nil {
		t.Fatal(err)
	}
	up = newAbove(t, r)
	if _, err := up.Stat(ctx, "sha256:boot-1"); !errdefs.IsNotFound(err) {
		t.Fatalf("containerd knows it still: %v", err)
	}
	if _, err := up.Prepare(ctx, "probe", ""); err != nil {
		t.Fatal(err)
	}
	if err := up.Remove(ctx, "probe"); err != nil { // that makes it look for garbage
		t.Fatal(err)
	}
	collect(t, up, r)
	if !r.daemon.empty() || len(names(t, r.root, snapshotsDir)) > 0 {
		t.Errorf("after the collection the daemon has %+v", r.daemon)
	}
	m, err := up.Prepare(ctx, "c", pull(ctx, t, up, "1", boot))
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != "pulled again" {
		t.Errorf("it reads %q", text)
	}
}

// TestOursWiped has our directory removed while containerd knows the images: it is told that
// they are not there, other images are pulled and run, and when it has let go of the old
// ones they can be pulled again.
func TestOursWiped(t *testing.T) {
	r := newLazy(t)
	ctx := namespaces.WithNamespace(t.Context(), "a")
	up := newAbove(t, r)
	top := pull(ctx, t, up, "1", bootstrapOf(t, "lost"))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"metadata.db", snapshotsDir} {
		if err := os.RemoveAll(filepath.Join(r.root, name)); err != nil {
			t.Fatal(err)
		}
	}
	r.open(t)
	if _, err := up.Prepare(ctx, "c", top); !errdefs.IsNotFound(err) {
		t.Errorf("a container of what was lost: %v", err)
	}
	m, err := up.Prepare(ctx, "other", pull(ctx, t, up, "2", bootstrapOf(t, "another")))
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != "another" {
		t.Errorf("the other image reads %q", text)
	}
	for _, key := range []string{top, "sha256:data-1"} {
		if err := up.Remove(ctx, key); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, up, r)
	m, err = up.Prepare(ctx, "c", pull(ctx, t, up, "1", bootstrapOf(t, "found")))
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != "found" {
		t.Errorf("it reads %q", text)
	}
}

// TestHungForEver has a caller without a deadline and a daemon that never answers.
func TestHungForEver(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "at last"))
	r.mountTime = 100 * time.Millisecond
	r.daemon.hang()
	defer r.daemon.wake()
	if _, err := r.Prepare(t.Context(), "c", top); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "hangs") {
		t.Errorf("who waits is told: %v", err)
	}
	if _, err := r.Stat(t.Context(), "c"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot that could not be had: %v", err)
	}
	r.daemon.wake()
	r.mountTime = mountTime
	prepare(t, r.Snapshotter, "c", top)
}
