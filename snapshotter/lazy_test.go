package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/erofsd/erofsd/internal/api"
)

// lazyRig is a snapshotter with a daemon.
type lazyRig struct {
	*Snapshotter
	root   string
	daemon *fakeDaemon
	opts   []Opt
}

func newLazy(t *testing.T, opts ...Opt) *lazyRig {
	t.Helper()
	r := &lazyRig{root: t.TempDir(), daemon: newFake(t), opts: opts}
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), r.daemon.end()); err != nil {
			t.Error(err)
		}
	})
	r.open(t)
	return r
}

func (r *lazyRig) open(t *testing.T) {
	t.Helper()
	var err error
	if r.Snapshotter, err = New(r.root, r.daemon, anywhere, r.opts...); err != nil {
		t.Fatal(err)
	}
}

// restart is what another process would find.
func (r *lazyRig) restart(t *testing.T) {
	t.Helper()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(t)
}

// with are the labels of a layer that is pulled.
func with(chainID string, more ...string) snapshots.Opt {
	labels := map[string]string{labelTarget: chainID}
	for i := 0; i < len(more); i += 2 {
		labels[more[i]] = more[i+1]
	}
	return snapshots.WithLabels(labels)
}

// pull does what containerd's unpacker does with a nydus image of one data layer, to sn; it
// returns the name of the image's uppermost snapshot.
func pull(ctx context.Context, t *testing.T, sn snapshots.Snapshotter, image string, bootstrap []byte, more ...string) string {
	t.Helper()
	data, top := "sha256:data-"+image, "sha256:boot-"+image
	if _, err := sn.Prepare(ctx, "extract-1 "+data, "", with(data, append(more, labelBlob, "true")...)); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("prepare of the data layer: %v", err)
	}
	if _, err := sn.Stat(ctx, data); err != nil {
		t.Fatalf("the data layer is not there: %v", err)
	}
	boot := with(top, append(more, labelBootstrap, "true")...)
	mounts, err := sn.Prepare(ctx, "extract-2 "+top, data, boot)
	if errdefs.IsAlreadyExists(err) {
		return top // in a namespace that has it
	}
	m := only(t, mounts, err)
	if m.Type != "bind" {
		t.Fatalf("the bootstrap layer is unpacked into %+v", m)
	}
	file := filepath.Join(m.Source, "image", "image.boot")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, bootstrap, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := sn.Commit(ctx, top, "extract-2 "+top, boot); err != nil {
		t.Fatal(err)
	}
	return top
}

// readIn mounts m as containerd does, reads hello and says whether it can be written.
func readIn(t *testing.T, m []mount.Mount) (text string, writable bool) {
	t.Helper()
	dir := t.TempDir()
	if err := mount.All(m, dir); err != nil {
		t.Fatalf("%+v: %v", m, err)
	}
	defer func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	p, err := os.ReadFile(filepath.Join(dir, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	err = os.WriteFile(filepath.Join(dir, "hello"), []byte("mine"), 0o600)
	return string(p), err == nil
}

// TestLazyImage pulls an image in two namespaces by way of containerd's own metadata, runs
// containers of it at once, and removes everything.
func TestLazyImage(t *testing.T) {
	r := newLazy(t)
	db, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	sn := metadata.NewDB(db, nil, map[string]snapshots.Snapshotter{"erofsd": r.Snapshotter}).Snapshotter("erofsd")
	a, b := namespaces.WithNamespace(t.Context(), "a"), namespaces.WithNamespace(t.Context(), "b")
	boot := bootstrapOf(t, "from the image")
	top := pull(a, t, sn, "1", boot, labelReference, "registry.example/app:1")
	pull(b, t, sn, "1", boot)
	if got := names(t, r.root, snapshotsDir); len(got) != 3 { // the data layer is one for both
		t.Errorf("directories %q, want 3", got)
	}

	var all sync.WaitGroup
	got := make([][]mount.Mount, 8)
	errs := make([]error, len(got))
	for i := range got {
		all.Go(func() { got[i], errs[i] = sn.Prepare(a, "c"+string(rune('0'+i)), top) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if n := r.daemon.count("mount"); n != 1 {
		t.Errorf("the image was mounted %d times for 8 containers", n)
	}
	for _, m := range got {
		if text, writable := readIn(t, m); text != "from the image" || !writable {
			t.Errorf("a container reads %q, can write: %v", text, writable)
		}
	}
	view, err := sn.View(a, "view", top)
	if err != nil {
		t.Fatal(err)
	}
	if text, writable := readIn(t, view); text != "from the image" || writable {
		t.Errorf("a view reads %q, can be written: %v", text, writable)
	}
	upper := upperOf(got[0][0])
	var st syscall.Stat_t
	if err := syscall.Stat(upper, &st); err != nil || st.Uid != 5 || st.Gid != 6 || st.Mode&0o7777 != 0o751 {
		t.Errorf("the container's root is %d:%d %o, %v; the image's is 5:6 751", st.Uid, st.Gid, st.Mode&0o7777, err)
	}

	for i := range got {
		if err := r.Remove(t.Context(), backend(t, r, "c"+string(rune('0'+i)))); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"view", top, top, "sha256:data-1"} {
		if err := r.Remove(t.Context(), backend(t, r, key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := len(names(t, r.root, snapshotsDir)) + len(names(t, r.root, trashDir)); left > 0 || !r.daemon.empty() {
		t.Errorf("%d directories are left, the daemon %+v", left, r.daemon)
	}
	r.daemon.order(t, "bind", "mount", "unmount", "unbind", "remove")
}

// backend returns a name that ends with key as the snapshotter knows it.
func backend(t *testing.T, r *lazyRig, key string) (name string) {
	t.Helper()
	err := r.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		if strings.HasSuffix(i.Name, key) {
			name = i.Name
		}
		return nil
	})
	if err != nil || name == "" {
		t.Fatalf("no snapshot %s: %v", key, err)
	}
	return name
}

// TestTargetOverAnotherParent has the same layer over two snapshots of the layer below.
func TestTargetOverAnotherParent(t *testing.T) {
	r := newLazy(t)
	layer(t, r.Snapshotter, "ns-a base", "")
	layer(t, r.Snapshotter, "ns-b base", "")
	for i, parent := range []string{"ns-a base", "ns-b base", "ns-a base", "ns-b base"} {
		_, err := r.Prepare(t.Context(), "extract", parent, with("sha256:x", labelBlob, "true"))
		if !errdefs.IsAlreadyExists(err) {
			t.Fatalf("prepare %d: %v", i, err)
		}
		found := 0
		err = r.Walk(t.Context(), func(context.Context, snapshots.Info) error { found++; return nil },
			`labels."containerd.io/snapshot.ref"==sha256:x,parent=="`+parent+`"`)
		if err != nil || found != 1 {
			t.Errorf("prepare %d: containerd finds %d snapshots, %v", i, found, err)
		}
	}
	if got := names(t, r.root, snapshotsDir); len(got) != 4 {
		t.Errorf("directories %q, want 4", got)
	}
}

// TestLayerOverLazy builds on a lazy image: layers over it, containers and views of those.
func TestLayerOverLazy(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "below"))
	layer(t, r.Snapshotter, "more", top, with("sha256:more"))
	view, err := r.View(t.Context(), "view", "more")
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string][]mount.Mount{"container": {prepare(t, r.Snapshotter, "c", "more")}, "view": view} {
		dir := t.TempDir()
		if err := mount.All(m, dir); err != nil {
			t.Fatalf("%s: %+v: %v", name, m, err)
		}
		for file, want := range map[string]string{"hello": "below", "more": "more"} {
			if p, err := os.ReadFile(filepath.Join(dir, file)); err != nil || string(p) != want {
				t.Errorf("%s: %s is %q, %v", name, file, p, err)
			}
		}
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	}
}

// TestShiftedLazy has a container in a user namespace see the files of a lazy image as its own.
func TestShiftedLazy(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "shifted"))
	m := prepare(t, r.Snapshotter, "c", top, snapshots.WithLabels(map[string]string{labelUIDMapping: "0:100000:65536", labelGIDMapping: "0:200000:65536"}))
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
	if err := syscall.Stat(filepath.Join(dir, "hello"), &st); err != nil || st.Uid != 100000 || st.Gid != 200000 {
		t.Errorf("a file of root belongs to %d:%d, %v; want 100000:200000", st.Uid, st.Gid, err)
	}
}

// TestSameBootstrap has two images with one bootstrap: the daemon has one, and keeps it until
// the second is removed.
func TestSameBootstrap(t *testing.T) {
	r := newLazy(t)
	boot := bootstrapOf(t, "twice")
	for _, image := range []string{"1", "2"} {
		top := pull(t.Context(), t, r, image, boot)
		prepare(t, r.Snapshotter, "c"+image, top)
	}
	remove := func(image string) {
		for _, key := range []string{"c" + image, "sha256:boot-" + image} {
			if err := r.Remove(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	remove("1")
	if n := r.daemon.count("unbind"); n != 0 {
		t.Error("the image was unbound while another snapshot has it")
	}
	m, err := r.Mounts(t.Context(), "c2")
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != "twice" {
		t.Errorf("the other container reads %q", text)
	}
	remove("2")
	if !r.daemon.empty() {
		t.Errorf("the daemon has %+v", r.daemon)
	}
}

// TestRecover starts again over mounted images, with a daemon that has kept them and with
// one that knows nothing.
func TestRecover(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "still here"))
	prepare(t, r.Snapshotter, "c", top)
	idle := pull(t.Context(), t, r, "2", bootstrapOf(t, "nobody has asked"))
	binds := r.daemon.count("bind")
	r.restart(t)
	await(t, "the image is bound again", func() bool { return r.daemon.count("bind") == binds+1 })

	r.daemon.mu.Lock() // it was killed, and the mount is dead
	clear(r.daemon.mounts)
	clear(r.daemon.bound)
	r.daemon.mu.Unlock()
	r.Recover()
	await(t, "the image is mounted again", func() bool { return r.daemon.count("mount") == 2 })
	m, err := r.Mounts(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != "still here" {
		t.Errorf("the container reads %q", text)
	}
	if n := r.daemon.count("mount"); n != 2 {
		t.Errorf("%d mounts, want 2: the image that nobody wants (%s) waits", n, idle)
	}
}

// TestDaemonAway has no daemon for a while.
func TestDaemonAway(t *testing.T) {
	r := newLazy(t)
	r.daemon.setDown(errors.New("connection refused"))
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "later"))
	if _, err := r.Prepare(t.Context(), "c", top); !errdefs.IsUnavailable(err) {
		t.Errorf("prepare without a daemon: %v", err)
	}
	if _, err := r.Stat(t.Context(), "c"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot that could not be had: %v", err)
	}
	layer(t, r.Snapshotter, "plain", "")
	prepare(t, r.Snapshotter, "p", "plain")

	r.daemon.setDown(nil)
	prepare(t, r.Snapshotter, "c", top)
	r.daemon.setDown(errors.New("connection refused"))
	for _, key := range []string{"c", top, "p"} {
		if err := r.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Cleanup(t.Context()); err == nil {
		t.Error("an image was cleaned up without its daemon")
	}
	r.restart(t) // what is left is found again
	r.daemon.setDown(nil)
	if err := r.Cleanup(t.Context()); err != nil || !r.daemon.empty() {
		t.Errorf("error %v, the daemon %+v", err, r.daemon)
	}
}

// TestTornBootstrap has a bootstrap changed behind the snapshotter's back, as a disk may do.
func TestTornBootstrap(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "whole"))
	prepare(t, r.Snapshotter, "c", top)
	if err := r.Remove(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	name := r.upper("3") + "/image/image.boot" // the first number is the store's own, the data layer has the second
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	binds := r.daemon.count("bind")
	r.images.forget()
	if _, err := r.Prepare(t.Context(), "d", top); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("prepare over a torn bootstrap: %v", err)
	}
	if n := r.daemon.count("bind"); n != binds {
		t.Error("the daemon was told of a torn bootstrap")
	}
}

// TestLostStore has the store removed and all that was in the snapshots become garbage, a
// mounted image too, while numbers come again.
func TestLostStore(t *testing.T) {
	r := newLazy(t)
	prepare(t, r.Snapshotter, "c", pull(t.Context(), t, r, "1", bootstrapOf(t, "lost")))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(r.root, "metadata.db")); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	for _, key := range []string{"a", "b", "c"} {
		prepare(t, r.Snapshotter, key, "")
	}
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "found"))
	if m, err := r.Prepare(t.Context(), "d", top); err != nil {
		t.Error(err)
	} else if text, _ := readIn(t, m); text != "found" {
		t.Errorf("the container reads %q", text)
	}
	if err := r.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if n, trash := len(names(t, r.root, snapshotsDir)), names(t, r.root, trashDir); n != 6 || len(trash) > 0 {
		t.Errorf("%d directories, want 6; in the trash %q", n, trash)
	}
	r.daemon.mu.Lock()
	defer r.daemon.mu.Unlock()
	if len(r.daemon.kept) != 1 {
		t.Errorf("the daemon has %d images, want 1", len(r.daemon.kept))
	}
}

// TestHungDaemon removes files and stops while the daemon does not answer.
func TestHungDaemon(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "stuck"))
	prepare(t, r.Snapshotter, "c", top)
	prepare(t, r.Snapshotter, "plain", "")
	r.daemon.hang()
	defer r.daemon.wake()
	for _, key := range []string{"c", top, "plain"} {
		if err := r.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the daemon is asked", func() bool { return r.daemon.waiting.Load() > 0 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Cleanup(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("clean up by somebody who left: %v", err)
	}
	layer(t, r.Snapshotter, "meanwhile", "")
	r.restart(t)
	r.daemon.wake()
	if err := r.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if got := names(t, r.root, snapshotsDir); len(got) != 2 { // the data layer and meanwhile
		t.Errorf("directories %q, want 2", got)
	}
}

// TestReference has the reference of an image found in all the places where it may be.
func TestReference(t *testing.T) {
	asked := ""
	r := newLazy(t, WithFinder(func(_ context.Context, chainID string) (string, error) {
		asked = chainID
		return "found.example/app:3", nil
	}))
	for image, c := range map[string]struct{ label, want string }{
		"1": {labelReference, "registry.example/app:1"},
		"2": {labelStargz, "registry.example/app:2"},
		"3": {"containerd.io/snapshot/other", "found.example/app:3"},
	} {
		top := pull(t.Context(), t, r, image, bootstrapOf(t, image), c.label, c.want)
		prepare(t, r.Snapshotter, "c"+image, top)
		r.daemon.mu.Lock()
		told := ""
		for _, b := range r.daemon.bound {
			told += string(b.Config)
		}
		r.daemon.mu.Unlock()
		if !strings.Contains(told, `"`+c.want+`"`) {
			t.Errorf("image %s: the daemon was not told %s, but %s", image, c.want, told)
		}
	}
	if asked != "sha256:boot-3" {
		t.Errorf("the finder was asked for %q", asked)
	}
}

// TestBadImage refuses what cannot become an image, as early as it is known.
func TestBadImage(t *testing.T) {
	r := newLazy(t)
	ctx := t.Context()
	for name, spoil := range map[string]func(dir string) error{
		"nothing":   func(string) error { return nil },
		"link":      func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "image.boot")) },
		"link away": func(dir string) error { return os.Symlink("/etc", filepath.Join(dir, "image")) },
		"directory": func(dir string) error { return os.MkdirAll(filepath.Join(dir, "image", "image.boot"), 0o700) },
	} {
		labels := with("sha256:"+name, labelBootstrap, "true")
		m := prepare(t, r.Snapshotter, name, "", labels)
		if err := spoil(m.Source); err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(ctx, "sha256:"+name, name, labels); err == nil || errdefs.IsUnavailable(err) {
			t.Errorf("%s: commit: %v", name, err)
		}
	}
	if _, err := r.Prepare(ctx, "five", "", with("sha256:5", labelBootstrap, "true", labelVersion, "5")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("RAFS 5: %v", err)
	}
	if _, err := r.Prepare(ctx, "data", "", with("sha256:d", labelBlob, "true")); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	for name, make := range map[string]func(context.Context, string, string, ...snapshots.Opt) ([]mount.Mount, error){"prepare": r.Prepare, "view": r.View} {
		if _, err := make(ctx, name, "sha256:d"); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s over a data layer: %v", name, err)
		}
	}
	// Labels of a pod are no layer's.
	m := prepare(t, r.Snapshotter, "pod", "", snapshots.WithLabels(map[string]string{labelBlob: "true", labelBootstrap: "true"}))
	if m.Type != "bind" {
		t.Errorf("a pod with a layer's labels gets %+v", m)
	}
}

// TestNoSource refuses an image whose data are nowhere, when it is pulled.
func TestNoSource(t *testing.T) {
	s, err := New(t.TempDir(), nil, func(_ context.Context, reference string) (Origin, error) {
		if reference == "" {
			return Origin{}, errdefs.ErrFailedPrecondition
		}
		return Origin{Config: json.RawMessage(`{}`)}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Prepare(t.Context(), "a", "", with("sha256:a", labelBootstrap, "true")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an image without a reference: %v", err)
	}
	prepare(t, s, "b", "", with("sha256:b", labelBootstrap, "true", labelReference, "registry.example/app"))
}

// TestLazyUsage counts what the daemon has, once for all.
func TestLazyUsage(t *testing.T) {
	r := newLazy(t)
	boot := bootstrapOf(t, "counted")
	var sizes []int64
	r.daemon.usage = api.Usage{Disk: 1100, Blobs: []api.BlobUsage{{ID: "b", Disk: 1000}}}
	for _, image := range []string{"1", "2"} {
		top := pull(t.Context(), t, r, image, boot)
		before, err := r.Usage(t.Context(), top)
		if err != nil {
			t.Fatal(err)
		}
		prepare(t, r.Snapshotter, "c"+image, top)
		after, err := r.Usage(t.Context(), top)
		if err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, after.Size-before.Size)
	}
	if sizes[0] != 1100 || sizes[1] != 0 {
		t.Errorf("the images that share everything count %v, want 1100 and 0", sizes)
	}
	for _, key := range []string{"c1", "sha256:boot-1"} {
		if err := r.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	u, err := r.Usage(t.Context(), "sha256:boot-2")
	if err != nil || u.Size < 1100 {
		t.Errorf("after the first was removed the second counts %d, %v", u.Size, err)
	}
}
