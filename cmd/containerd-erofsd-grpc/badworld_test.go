package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/regserver"
)

// A badWorld is a rig and a registry that answers for some repositories as a test says. What
// is bad is an image of its own, beside a good one that must not notice.
type badWorld struct {
	*rig
	sn     snapshots.Snapshotter
	faults *backendtest.HTTPFaults
	server *httptest.Server // of the registry
	host   string
	tree   testenv.Tree
	daemon *api.Client

	good     string // the uppermost snapshot of the good image
	rounds   int    // of checks of the good one
	goodFile []string
}

// The fixtures: the images have no data in common.
const (
	goodImage = "zstd"
	badImage  = "sha256-64k"
)

// newBadWorld starts it; the good image is pulled.
func newBadWorld(t *testing.T) *badWorld {
	t.Helper()
	return newBadWorldOn(t, newRig(t))
}

// newBadWorldOn is newBadWorld on a rig that was not started.
func newBadWorldOn(t *testing.T, r *rig) *badWorld {
	t.Helper()
	w := &badWorld{rig: r, tree: testenv.LoadTree(t, "tree.jsonl")}
	w.serve(t)
	text, err := os.ReadFile(w.config)
	if err != nil {
		t.Fatal(err)
	}
	config := strings.Replace(string(text), `"--rlimit-nofile"`, `"--no-completion", "--fill-timeout", "5s", "--rlimit-nofile"`, 1) +
		"[backend]\nplain_http = [\"" + w.host + "\"]\n"
	if err := os.WriteFile(w.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	w.sn = w.snapshots(t)
	w.daemon = api.NewClient(filepath.Join(w.dir, "run", "erofsd.sock"))
	t.Cleanup(func() { w.daemon.Close() })
	if w.good, err = w.pull(t.Context(), "good", w.host+"/team/good:1", fixture(t, goodImage)); err != nil {
		t.Fatal(err)
	}
	for name, e := range w.tree {
		if e.SHA256 != "" && strings.HasPrefix(name, "sizes/") {
			w.goodFile = append(w.goodFile, name)
		}
	}
	return w
}

// serve starts a registry with the data of both images.
func (w *badWorld) serve(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	blobs := filepath.Join(dir, "blobs")
	if err := os.Mkdir(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{goodImage, badImage} {
		if err := os.CopyFS(blobs, os.DirFS(filepath.Join(testenv.Fixtures(t), name, "blobs"))); err != nil {
			t.Fatal(err)
		}
	}
	reg, err := regserver.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	w.faults = backendtest.NewHTTPFaults(reg)
	w.server = httptest.NewServer(w.faults)
	t.Cleanup(func() {
		w.server.CloseClientConnections()
		w.server.Close()
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	})
	w.host = strings.TrimPrefix(w.server.URL, "http://")
}

// fixture is the bootstrap of an image.
func fixture(t *testing.T, name string) []byte {
	t.Helper()
	boot, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), name, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	return boot
}

// pull does what containerd does with an image's bootstrap layer, and returns its name.
func (w *badWorld) pull(ctx context.Context, name, reference string, boot []byte) (top string, err error) {
	top = "sha256:" + name
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: top, "containerd.io/snapshot/nydus-bootstrap": "true", "containerd.io/snapshot/cri.image-ref": reference,
	})
	mounts, err := w.sn.Prepare(ctx, "extract "+name, "", labels)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(mounts[0].Source, "image")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "image.boot"), boot, 0o600)); err != nil {
		return "", err
	}
	return top, w.sn.Commit(ctx, top, "extract "+name, labels)
}

// run mounts a container of an image, has f look at it and removes it.
func (w *badWorld) run(t *testing.T, key, top string, f func(root string)) {
	t.Helper()
	mounts, err := w.sn.Prepare(t.Context(), key, top)
	if err != nil {
		t.Fatalf("prepare %s: %v", key, err)
	}
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatalf("%+v: %v", mounts, err)
	}
	defer func() {
		if err := errors.Join(mount.UnmountAll(dir, 0), w.sn.Remove(t.Context(), key)); err != nil {
			t.Error(err)
		}
	}()
	f(dir)
}

// read reads a file of an image; wrong bytes are an error of the test.
func (w *badWorld) read(t *testing.T, root, name string) error {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		return err
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(p)); got != w.tree[name].SHA256 {
		t.Errorf("%s has wrong bytes", name)
	}
	return nil
}

// reads reads a file until that succeeds.
func (w *badWorld) reads(t *testing.T, root, name string) {
	t.Helper()
	for end := time.Now().Add(patienceOfTest); ; time.Sleep(20 * time.Millisecond) {
		err := w.read(t, root, name)
		if err == nil {
			return
		}
		if !errors.Is(err, syscall.EIO) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// others checks what has nothing to do with the bad image: a container of the good one reads,
// and an ordinary layer is unpacked.
func (w *badWorld) others(t *testing.T) {
	t.Helper()
	name := w.goodFile[w.rounds%len(w.goodFile)]
	key := fmt.Sprint("good-", w.rounds)
	w.rounds++
	w.run(t, key, w.good, func(root string) {
		if err := w.read(t, root, name); err != nil {
			t.Errorf("the good image: %v", err)
		}
	})
	w.ordinary(t, key)
}

// ordinary unpacks a layer of an ordinary image and removes it.
func (w *badWorld) ordinary(t *testing.T, name string) {
	t.Helper()
	chain := "sha256:ordinary-" + name
	labels := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chain})
	_, err := w.sn.Prepare(t.Context(), "extract "+chain, "", labels)
	if err == nil {
		err = w.sn.Commit(t.Context(), chain, "extract "+chain, labels)
	}
	if err == nil {
		_, err = w.sn.Prepare(t.Context(), chain+" container", chain)
	}
	if err == nil {
		err = errors.Join(w.sn.Remove(t.Context(), chain+" container"), w.sn.Remove(t.Context(), chain))
	}
	if err != nil {
		t.Errorf("an ordinary image: %v", err)
	}
}

// forget removes a bad image and all that is kept of it.
func (w *badWorld) forget(t *testing.T, top string) {
	t.Helper()
	if err := w.sn.Remove(t.Context(), top); err != nil {
		t.Error(err)
	}
	w.swept(t)
}

// clean checks that the good image is all that there is.
func (w *badWorld) clean(t *testing.T) {
	t.Helper()
	w.swept(t)
	var left []string
	err := w.sn.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		if i.Name != w.good {
			left = append(left, i.Name)
		}
		return nil
	})
	mounts, merr := mountinfo.GetMounts(mountinfo.PrefixFilter(w.dir))
	if err != nil || merr != nil || len(left) > 0 || len(mounts) > 1 {
		t.Errorf("left: snapshots %.1000q, %d mounts; %v, %v", left, len(mounts), err, merr)
	}
	entries, err := os.ReadDir(filepath.Join(w.dir, "root", "snapshots"))
	if err != nil || len(entries) != 1 {
		t.Errorf("%d directories of snapshots, %v; want that of the good image", len(entries), err)
	}
}

// swept cleans up until that succeeds: the daemon may still be about to let go of an image.
func (w *badWorld) swept(t *testing.T) {
	t.Helper()
	w.until(t, "everything that was removed is gone", func() bool {
		err := w.sn.(snapshots.Cleaner).Cleanup(t.Context())
		if err != nil {
			t.Log(err)
		}
		return err == nil
	})
}

// gone waits until there is no snapshot called key: who leaves is not told when it has gone.
func (w *badWorld) gone(t *testing.T, key string) {
	t.Helper()
	w.until(t, "snapshot "+key+" is gone", func() bool {
		_, err := w.sn.Stat(t.Context(), key)
		return errdefs.IsNotFound(err)
	})
}

// until waits until ok.
func (w *badWorld) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patienceOfTest); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after %v; the log:\n%s", what, patienceOfTest, w.log.String())
		}
	}
}
