package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/erofsd/erofsd/internal/api"
)

// nydusRoot makes the directory of an installation of nydus-snapshotter: an image with one
// layer of data, a container of it that has written a file, and what else lies there.
func nydusRoot(t *testing.T, root string, bootstrap []byte) {
	t.Helper()
	store, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	err = store.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		data := with("sha256:data", labelBlob, "true", labelReference, "registry.example/app:1")
		boot := with("sha256:boot", labelBootstrap, "true", labelReference, "registry.example/app:1")
		for _, l := range []struct {
			key, name, parent string
			opt               snapshots.Opt
		}{{"k8s.io/1/extract-1 data", "sha256:data", "", data}, {"k8s.io/2/extract-2 boot", "k8s.io/3/sha256:boot", "sha256:data", boot}} {
			sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, l.key, l.parent, l.opt)
			if err == nil {
				_, err = storage.CommitActive(ctx, l.key, l.name, snapshots.Usage{Size: 4096, Inodes: 1}, l.opt)
			}
			if err == nil {
				err = os.MkdirAll(filepath.Join(root, snapshotsDir, sn.ID, "fs"), 0o755)
			}
			if err != nil {
				return err
			}
		}
		sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "k8s.io/4/container", "k8s.io/3/sha256:boot")
		if err != nil {
			return err
		}
		dir := filepath.Join(root, snapshotsDir, sn.ID)
		return errors.Join(os.MkdirAll(filepath.Join(dir, "work"), 0o711), os.Mkdir(filepath.Join(dir, "fs"), 0o755),
			os.WriteFile(filepath.Join(dir, "fs", "mine"), []byte("of the container"), 0o600))
	})
	image := filepath.Join(root, snapshotsDir, "2", "fs", "image")
	err = errors.Join(err, os.Mkdir(image, 0o755), os.WriteFile(filepath.Join(image, "image.boot"), bootstrap, 0o644),
		os.WriteFile(filepath.Join(image, "sha256.blob.meta"), []byte("index"), 0o644), os.Mkdir(filepath.Join(root, snapshotsDir, "2", "mnt"), 0o755))
	for _, dir := range []string{"cache", "config/cq1/2", "logs", "socket/cq1", "supervisor", "mnt", snapshotsDir + "/new-123"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	err = errors.Join(err, os.WriteFile(filepath.Join(root, "nydus.db"), []byte("its own"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
}

// TestNydusRoot takes up what nydus-snapshotter left: its images are served, its containers
// go on with their files, what it alone knows stays, and all of it can be removed.
func TestNydusRoot(t *testing.T) {
	r := &lazyRig{root: t.TempDir(), daemon: newFake(t)}
	nydusRoot(t, r.root, bootstrapOf(t, "from its image"))
	r.open(t)
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), r.daemon.end()); err != nil {
			t.Error(err)
		}
	})
	m, err := r.Mounts(t.Context(), "k8s.io/4/container")
	if err != nil {
		t.Fatal(err)
	}
	if text, writable := readIn(t, m); text != "from its image" || !writable {
		t.Errorf("the container reads %q, writable %v", text, writable)
	}
	if p, err := os.ReadFile(filepath.Join(r.root, snapshotsDir, "3", "fs", "mine")); err != nil || string(p) != "of the container" {
		t.Errorf("its own file: %q, %v", p, err)
	}
	if got := r.daemon.bindings(); len(got) != 1 || string(got[0].Config) != `"registry.example/app:1"` {
		t.Errorf("bound %+v", got)
	}
	if _, err := r.Prepare(t.Context(), "k8s.io/5/container", "k8s.io/3/sha256:boot"); err != nil {
		t.Errorf("a new container of its image: %v", err)
	}
	for _, key := range []string{"k8s.io/5/container", "k8s.io/4/container", "k8s.io/3/sha256:boot", "sha256:data"} {
		if err := r.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := names(t, r.root, snapshotsDir); len(got) != 0 || !r.daemon.empty() {
		t.Errorf("after the removal there is %q", got)
	}
	if p, err := os.ReadFile(filepath.Join(r.root, "nydus.db")); err != nil || string(p) != "its own" {
		t.Errorf("its database: %q, %v", p, err)
	}
}

// bindings returns what is bound.
func (d *fakeDaemon) bindings() (all []api.BindRequest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.bound {
		all = append(all, b)
	}
	return all
}
