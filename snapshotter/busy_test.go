package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

// TestPullWhileCollecting pulls, starts and removes images while garbage is collected all the
// time; each container reads the bytes of its image, and nothing is left in the end.
func TestPullWhileCollecting(t *testing.T) {
	const images, rounds = 4, 5
	r := newLazy(t)
	var boots [images][]byte
	for i := range images {
		boots[i] = bootstrapOf(t, fmt.Sprint("image ", i))
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var collector, pullers sync.WaitGroup
	collector.Go(func() {
		for ctx.Err() == nil {
			if err := r.Cleanup(ctx); err != nil && ctx.Err() == nil {
				t.Errorf("clean up: %v", err)
			}
		}
	})
	for i := range images {
		pullers.Go(func() {
			for n := range rounds {
				if err := r.round(t, fmt.Sprintf("%d-%d", i, n), boots[i], fmt.Sprint("image ", i)); err != nil {
					t.Errorf("image %d, round %d: %v", i, n, err)
				}
			}
		})
	}
	pullers.Wait()
	stop()
	collector.Wait()
	if err := r.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if left := len(names(t, r.root, snapshotsDir)) + len(names(t, r.root, trashDir)); left > 0 || !r.daemon.empty() {
		t.Errorf("%d directories are left, the daemon %+v", left, r.daemon)
	}
}

// round pulls an image, starts two containers of it, one of which is removed while it is
// started, and removes everything.
func (r *lazyRig) round(t *testing.T, name string, boot []byte, want string) error {
	top := "sha256:" + name
	labels := with(top, labelBootstrap, "true")
	m, err := r.Prepare(t.Context(), "extract "+name, "", labels)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(m[0].Source, "image.boot"), boot, 0o600); err != nil {
		return err
	}
	if err := r.Commit(t.Context(), top, "extract "+name, labels); err != nil {
		return err
	}
	gone := make(chan error, 1)
	go func() {
		_, err := r.Prepare(t.Context(), "gone "+name, top)
		gone <- err
	}()
	removed := r.Remove(t.Context(), "gone "+name) // before, while or after it is started
	if m, err = r.Prepare(t.Context(), "c "+name, top); err != nil {
		return err
	}
	text, err := readFrom(m, t.TempDir())
	if err == nil && text != want {
		err = fmt.Errorf("it reads %q, want %q", text, want)
	}
	if perr := <-gone; perr == nil && removed != nil {
		removed = r.Remove(t.Context(), "gone "+name)
	} else if perr != nil && !errdefs.IsNotFound(perr) {
		err = errors.Join(err, perr)
	}
	if removed != nil && !errdefs.IsNotFound(removed) {
		err = errors.Join(err, removed)
	}
	return errors.Join(err, r.Remove(t.Context(), "c "+name), r.Remove(t.Context(), top))
}

// readFrom mounts m at dir and reads hello.
func readFrom(m []mount.Mount, dir string) (string, error) {
	if err := mount.All(m, dir); err != nil {
		return "", err
	}
	p, err := os.ReadFile(filepath.Join(dir, "hello"))
	return string(p), errors.Join(err, mount.UnmountAll(dir, 0))
}

// TestRecoverOthers has one of three mounted images damaged when the daemon is another one:
// the other two are recovered.
func TestRecoverOthers(t *testing.T) {
	r := newLazy(t)
	for _, image := range []string{"1", "2", "3"} {
		prepare(t, r.Snapshotter, "c"+image, pull(t.Context(), t, r, image, bootstrapOf(t, "image "+image)))
	}
	images, err := r.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		if i.Name == "sha256:boot-2" {
			t.Cleanup(func() { syscall.Unmount(i.Mountpoint, syscall.MNT_DETACH) })
			f, err := os.OpenFile(filepath.Join(i.Dir, "fs", "image", "image.boot"), os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write(make([]byte, 100)); errors.Join(err, f.Close()) != nil {
				t.Fatal(err)
			}
		}
	}
	r.daemon.mu.Lock()
	clear(r.daemon.mounts)
	clear(r.daemon.bound)
	r.daemon.mu.Unlock()
	r.Recover()
	await(t, "the others are mounted again", func() bool { return r.daemon.count("mount") == 5 })
	for _, image := range []string{"1", "3"} {
		m, err := r.Mounts(t.Context(), "c"+image)
		if err != nil {
			t.Fatal(err)
		}
		if text, _ := readIn(t, m); text != "image "+image {
			t.Errorf("container %s reads %q", image, text)
		}
	}
	if _, err := r.Mounts(t.Context(), "c2"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("mounts over the damaged one: %v", err)
	}
}

// TestSetuid has the root of a container mounted such that programs can be setuid, and devices
// be opened.
func TestSetuid(t *testing.T) {
	r := newLazy(t)
	m := prepare(t, r.Snapshotter, "c", pull(t.Context(), t, r, "1", bootstrapOf(t, "flags")))
	dir := t.TempDir()
	if err := mount.All([]mount.Mount{m}, dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil || st.Flags&(syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC) != 0 {
		t.Errorf("the flags of the mount are %#x, %v", st.Flags, err)
	}
}
