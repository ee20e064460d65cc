package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/cachefiles"
)

// A mount that a dead daemon had begun fails, and the kernel closes its bootstrap, at the
// moment in which the next daemon opens the same image.
func TestMountWithdrawn(t *testing.T) {
	d := startFake(t, true)
	r, k := d.fixture(t, "zstd")
	boot := k.object(k.id)
	o := d.open(t, boot) // of the mount that fails
	await(t, "the object", func() bool { return d.newest(boot) != nil })
	f := d.newest(boot)
	o.Close()
	await(t, "its end", func() bool { return d.newest(boot) == nil && d.k.OpenFiles() == 0 })
	d.t.mu.Lock()
	d.t.files[boot] = f // the moment before
	d.t.mu.Unlock()
	if _, err := d.mountImage(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// leaveUnknown writes a byte to the object of k that no image has, and returns it open
// again: what a dead daemon left of a blob of which nothing is known.
func (d *inProcess) leaveUnknown(t *testing.T, k cachefiles.Key) interface{ Close() } {
	t.Helper()
	o := d.open(t, k)
	await(t, "the object", func() bool { return d.newest(k) != nil })
	p, free, err := cachefiles.AlignedBuffer(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer free()
	p[0] = 1
	if _, err := d.newest(k).WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	o.Close() // it has a name from now on
	o = d.open(t, k)
	await(t, "the object again", func() bool { return d.newest(k) != nil })
	return o
}

// What a dead daemon left of a blob of which nothing is known cannot be removed before the
// kernel has closed it.
func TestMountWaitsForClose(t *testing.T) {
	d := startFake(t, true)
	r, k := d.fixture(t, "zstd")
	blob := k.object(fixtureBlobs(t, r.Bootstrap)[0])
	o := d.leaveUnknown(t, blob)
	closing := time.AfterFunc(100*time.Millisecond, o.Close)
	defer closing.Stop()
	if _, err := d.mountImage(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if d.k.Has(blob) {
		t.Error("what nobody knows is still there")
	}
}

// As long as that cannot be removed nothing is kept that would have the next mount, or the
// next daemon, trust it.
func TestUnknownIsNeverTrusted(t *testing.T) {
	d := startFake(t, true)
	r, k := d.fixture(t, "zstd")
	id := fixtureBlobs(t, r.Bootstrap)[0]
	blob := k.object(id)
	o := d.leaveUnknown(t, blob)
	_, err := d.mountImage(t.Context(), r)
	if !errors.Is(err, cachefiles.ErrInUse) {
		t.Errorf("mount: %v", err)
	}
	if d.blobs.Kept(k.domain, id) {
		t.Error("a chunk table is kept that vouches for what nobody knows")
	}
	o.Close()
	if _, err := d.mountImage(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if d.k.Has(blob) {
		t.Error("what nobody knows is still there")
	}
}

// fixtureBlobs returns the names of a bootstrap's blobs.
func fixtureBlobs(t testing.TB, boot string) (ids []string) {
	t.Helper()
	f, err := os.Open(boot)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, _, err := openImage(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := blobEntries(m)
	if err != nil || len(entries) == 0 {
		t.Fatalf("%d blobs, %v", len(entries), err)
	}
	for _, e := range entries {
		ids = append(ids, e.ID)
	}
	return ids
}

// lateFile cannot be attached the first time.
type lateFile struct {
	*bootFile
	tries int
}

func (l *lateFile) attach(ctx context.Context, f *cachefiles.File) error {
	if l.tries++; l.tries == 1 {
		return syscall.ENOBUFS
	}
	return l.bootFile.attach(ctx, f)
}

// A kernel that is slow to attach a file has done so when it sends a READ.
func TestOpenedLate(t *testing.T) {
	d := startFake(t, false)
	name := filepath.Join(t.TempDir(), "boot")
	if err := os.WriteFile(name, []byte("a bootstrap"), 0o600); err != nil {
		t.Fatal(err)
	}
	boot, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer boot.Close()
	k := imageKey{id: "late"}.object("late")
	d.t.mu.Lock()
	d.t.objects[k] = &lateFile{bootFile: newBootFile(boot, 11)}
	d.t.mu.Unlock()
	o := d.open(t, k)
	defer o.Close()
	p := make([]byte, 11)
	if err := o.ReadAt(t.Context(), p, 0); err != nil || string(p) != "a bootstrap" {
		t.Errorf("%q, %v", p, err)
	}
}

// An image that is opened while an older one of the same name is being closed has its
// bootstrap served on.
func TestOpenedWhileClosed(t *testing.T) {
	d := startFake(t, false)
	r, k := d.fixture(t, "zstd")
	old := d.acquired(t, r)
	d.mu.Lock()
	delete(d.images, k) // closeIfIdle has come so far
	d.mu.Unlock()
	young := d.acquired(t, r)
	if err := d.closeImage(old); err != nil {
		t.Error(err)
	}
	if s, ok := d.t.behind(k.object(k.id)).(*bootFile); !ok || s.f != young.boot {
		t.Error("the bootstrap of the image that is open is not known")
	}
	d.release(young)
}
