package snapshotter

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/testenv"
)

// smallDisk mounts an ext4 of 24 MB; fill takes all its room, and free gives that back.
func smallDisk(t *testing.T) (dir string, fill, free func()) {
	t.Helper()
	testenv.Root(t)
	mkfs := testenv.Tool(t, "mkfs.ext4")
	image, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 24<<20)); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{{mkfs, "-q", "-m0", "-b4096", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", command, err, out)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount the disk: %v", err)
		}
	})
	ballast := filepath.Join(dir, "ballast")
	fill = func() {
		t.Helper()
		f, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		for p := make([]byte, 1<<20); len(p) > 0; {
			if _, err = f.Write(p); errors.Is(err, syscall.ENOSPC) {
				p, err = p[:len(p)/2], nil
			}
			if err != nil {
				break
			}
		}
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return dir, fill, func() {
		t.Helper()
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		syscall.Sync() // ext4 gives blocks back when its journal says so
	}
}

// TestDiskFull has no room for the metadata, for a bootstrap that is unpacked, and for what is
// written down before an image is mounted: each says so, leaves nothing, and goes on when there
// is room again. What needs no room goes on meanwhile.
func TestDiskFull(t *testing.T) {
	disk, fill, free := smallDisk(t)
	r := &lazyRig{root: filepath.Join(disk, "root"), daemon: newFake(t)}
	r.open(t)
	defer func() {
		if err := errors.Join(r.daemon.end(), r.Close()); err != nil {
			t.Error(err)
		}
	}()
	boot := bootstrapOf(t, "little room")
	first := pull(t.Context(), t, r, "1", boot)
	idle := pull(t.Context(), t, r, "2", bootstrapOf(t, "not mounted yet"))
	prepare(t, r.Snapshotter, "c", first)

	bootLayer := with("sha256:boot-3", labelBootstrap, "true")
	m := prepare(t, r.Snapshotter, "extract-3", "", bootLayer)
	fill()
	if n, err := fillWith(filepath.Join(m.Source, "image.boot"), boot); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%d bytes of a bootstrap were unpacked: %v", n, err)
	}
	full := func(what string, err error) {
		t.Helper()
		if err == nil || errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	var failed bool
	for i := range 2000 { // the store has room of its own for some
		chain := "sha256:" + strings.Repeat("x", 1+i)
		_, err := r.Prepare(t.Context(), "extract "+chain, "", with(chain, labelBlob, "true"))
		if !errdefs.IsAlreadyExists(err) {
			full("a layer of data", err)
			failed = true
			break
		}
	}
	if !failed {
		t.Error("the disk is not full")
	}
	_, err := r.Prepare(t.Context(), "d", idle)
	full("a container", err)
	if _, err := r.Mounts(t.Context(), "c"); err != nil {
		t.Errorf("mounts of a container on a full disk: %v", err)
	}
	if _, err := r.Usage(t.Context(), "c"); err != nil {
		t.Errorf("usage on a full disk: %v", err)
	}
	free()

	if err := errors.Join(os.RemoveAll(filepath.Join(m.Source, "image.boot")), r.Remove(t.Context(), "extract-3")); err != nil {
		t.Error(err)
	}
	if left := names(t, r.root, newDir); len(left) > 0 {
		t.Errorf("left of what failed: %q", left)
	}
	for key, top := range map[string]string{"d": idle, "e": pull(t.Context(), t, r, "3", boot)} {
		m, err := r.Prepare(t.Context(), key, top)
		if err != nil {
			t.Fatalf("with room again: %v", err)
		}
		if text, _ := readIn(t, m); text == "" {
			t.Errorf("%s reads nothing", key)
		}
	}
	r.restart(t) // over the store that had no room
	if _, err := r.Mounts(t.Context(), "d"); err != nil {
		t.Error(err)
	}
}

// fillWith writes a file as containerd's applier does.
func fillWith(name string, p []byte) (n int64, err error) {
	f, err := os.Create(name)
	if err != nil {
		return 0, err
	}
	n, err = io.Copy(f, strings.NewReader(string(p)))
	return n, errors.Join(err, f.Sync(), f.Close())
}
