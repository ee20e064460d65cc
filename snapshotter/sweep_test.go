package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
)

// TestStuckImageIsAlone removes containers while an image cannot be taken back from the daemon:
// their files go, and the daemon is not asked for that image again with each of them.
func TestStuckImageIsAlone(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r.Snapshotter, "1", bootstrapOf(t, "hello"))
	m, err := r.Prepare(t.Context(), "c", top)
	only(t, m, err)
	r.daemon.setDown(errors.New("not now"))
	for _, key := range []string{"c", top, "sha256:data-1"} {
		if err := r.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the daemon is asked", func() bool { return r.daemon.count("unmount") > 0 })
	const containers = 300
	for i := range containers {
		key := fmt.Sprint("other-", i)
		prepare(t, r.Snapshotter, key, "")
		if err := r.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		await(t, "the container's files go", func() bool { return len(names(t, r.root, snapshotsDir))+len(names(t, r.root, trashDir)) == 1 })
	}
	if n := r.daemon.count("unmount"); n > containers/2 {
		t.Errorf("the daemon was asked %d times for one image while %d containers were removed", n, containers)
	}
	r.daemon.setDown(nil)
	await(t, "the image goes", r.daemon.empty)
}

// TestRemovalWaitsForNobody removes the files of a container while somebody writes to the store.
func TestRemovalWaitsForNobody(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	prepare(t, s, "c", "")
	if err := s.Cleanup(t.Context()); err != nil { // what the start has looked for
		t.Fatal(err)
	}
	if err := s.sweeping.take(t.Context()); err != nil { // until there is a writer
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	err := s.store.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		s.sweeping.give()
		for end := time.Now().Add(30 * time.Second); len(names(t, root, snapshotsDir))+len(names(t, root, trashDir)) > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				return errors.New("the files wait for the transaction")
			}
		}
		_, err := storage.IDMap(ctx)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
