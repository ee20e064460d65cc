package erofs_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestKernelAgrees mounts damaged images that Check accepts and compares what
// the kernel shows with what the reader does: nothing may be an error, and no
// path, attribute or byte may differ.
func TestKernelAgrees(t *testing.T) {
	needMount(t)
	boot, cache := layOut(t)
	image, err := os.ReadFile(boot)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(cache)
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	accepted := 0
	for range 400 {
		img := bytes.Clone(image)
		for range 1 + r.IntN(3) {
			img[r.IntN(len(img))] ^= 1 << r.IntN(8)
		}
		if _, err := check(img, erofs.Limits{}); err != nil {
			continue
		}
		if accepted++; accepted == 40 {
			break
		}
		want, err := imageTree(open(t, img), img, data)
		if err != nil {
			t.Fatal(err)
		}
		compareKernel(t, img, cache, want)
	}
	if accepted == 0 {
		t.Error("no damaged image was accepted, so nothing was compared")
	}
}

func compareKernel(t *testing.T, img []byte, cache string, want testenv.Tree) {
	t.Helper()
	dir := t.TempDir()
	boot, target := filepath.Join(dir, "boot"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.WriteFile(boot, img, 0o600), os.Mkdir(target, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := erofs.Mount(erofs.MountOptions{Source: boot, Devices: []string{cache}, Target: target}); err != nil {
		t.Errorf("accepted, and the kernel refuses it: %v", err)
		return
	}
	defer func() {
		if err := syscall.Unmount(target, 0); err != nil {
			t.Error(err)
		}
	}()
	got, err := testenv.ScanTree(target, true)
	if err != nil {
		t.Errorf("accepted, and cannot be read: %v", err)
		return
	}
	want.Compare(t, got, true)
}
