package main

import (
	"errors"
	"net/http"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/backend/backendtest"
)

// kill ends processes without a word.
func kill(t *testing.T, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
	}
}

// TestReboot starts a node whose registry is down: no process and no mount is left of before.
// The snapshotter serves at once, what was read is read again, and the rest is when the
// registry is back.
func TestReboot(t *testing.T) {
	t.Parallel() // it waits
	w := newBadWorld(t)
	const seen, unseen = "dup/a", "big/rand-2m"
	if _, err := w.sn.Prepare(t.Context(), "container", w.good); err != nil {
		t.Fatal(err)
	}
	w.run(t, "before", w.good, func(root string) { w.reads(t, root, seen) })
	w.stop(t, syscall.SIGKILL)
	worker, keeper := w.rig.daemon(t)
	kill(t, keeper, worker)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(w.dir))
	if err != nil || len(mounts) == 0 {
		t.Fatalf("%d mounts, %v", len(mounts), err)
	}
	for _, m := range mounts {
		if err := syscall.Unmount(m.Mountpoint, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	w.faults.Add(backendtest.All, -1, backendtest.Status(http.StatusServiceUnavailable))
	w.start(t)
	w.ordinary(t, "after the reboot")
	w.run(t, "after", w.good, func(root string) {
		if err := w.read(t, root, seen); err != nil {
			t.Errorf("what was read before: %v", err)
		}
		if err := w.read(t, root, unseen); !errors.Is(err, syscall.EIO) {
			t.Errorf("what was not read before: %v", err)
		}
		w.recovered()
		w.reads(t, root, unseen)
	})
	if _, err := w.sn.Mounts(t.Context(), "container"); err != nil {
		t.Errorf("a container of before: %v", err)
	}
	if err := w.sn.Remove(t.Context(), "container"); err != nil {
		t.Error(err)
	}
	w.clean(t)
}

// TestEndWhileWaiting ends the snapshotter while somebody waits for an image: he is told, and
// nothing of what he wanted stays.
func TestEndWhileWaiting(t *testing.T) {
	t.Parallel() // it waits
	w := newBadWorld(t)
	top, err := w.pull(t.Context(), "bad", w.host+"/team/bad:1", fixture(t, badImage))
	if err != nil {
		t.Fatal(err)
	}
	w.faults.Add(backendtest.Path("/team/bad/"), -1, backendtest.Stall(-1))
	before, _ := w.faults.Requests()
	ended := make(chan error, 1)
	go func() {
		_, err := w.sn.Prepare(t.Context(), "waits", top)
		ended <- err
	}()
	w.until(t, "the registry is asked", func() bool { n, _ := w.faults.Requests(); return n > before })
	w.stop(t, syscall.SIGTERM)
	if err := <-ended; err == nil {
		t.Error("who waited has got it")
	}
	if code := w.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("it ended with %d; the log:\n%s", code, w.log.String())
	}
	w.start(t)
	if _, err := w.sn.Stat(t.Context(), "waits"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot that could not be had: %v", err)
	}
	w.recovered()
	w.run(t, "waits", top, func(root string) { w.reads(t, root, "dup/a") })
	w.forget(t, top)
	w.clean(t)
}
