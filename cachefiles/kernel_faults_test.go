package cachefiles_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

// Race 1 with a real kernel: who fills in Opened meets no error.
func TestKernelOpenedFills(t *testing.T) {
	d := kernelDevice(t, cacheRoot(t))
	img := newImage(t, "", "img2", "blob2", 1<<20)
	written := make(chan error, 1)
	img.blob.opened = func(_ context.Context, f *File) error {
		written <- img.blob.writeTo(f, 0, 512<<10)
		return nil
	}
	img.blob.fill = func(_ context.Context, off, n int64) error {
		if off < 512<<10 {
			t.Errorf("READ of %d bytes at %d, which Opened has written", n, off)
		}
		return img.blob.write(off, n)
	}
	var runs [][2]int64
	img.boot.opened = func(_ context.Context, f *File) error {
		return f.Data(1<<20, func(off, end int64) { runs = append(runs, [2]int64{off, end}) })
	}
	s := start(t, d, handle(img.boot, img.blob), Options{})
	m := mount(t, img)
	if len(runs) != 0 {
		t.Errorf("a new object has data at %v", runs)
	}
	if err := get(t, written); err != nil { // the mount did not wait for it
		t.Errorf("write at once: %v", err)
	}
	m.check(0, len(img.blob.data))
	m.unmount()
	closedAll(t, s)
	img.blob.opened = nil
	m = mount(t, img)
	if end := int64(len(img.boot.data)+page-1) / page * page; len(runs) == 0 || runs[0][0] != 0 || runs[len(runs)-1][1] > end {
		t.Errorf("data of the bootstrap: %v of %d", runs, end)
	}
	m.unmount()
	closedAll(t, s)
}

// A READ that fails is EIO, and the next one works.
func TestKernelFailedFill(t *testing.T) {
	d := kernelDevice(t, cacheRoot(t))
	img := newImage(t, "", "img3", "blob3", 1<<20)
	img.blob.fill = func(context.Context, int64, int64) error { return errors.New("backend down") }
	s := start(t, d, handle(img.boot, img.blob), Options{})
	m := mount(t, img)
	if _, err := m.read(0, page); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v", err)
	}
	img.blob.fill = func(_ context.Context, off, _ int64) error { return img.blob.write(off, page) } // a prefix
	m.check(0, 256<<10)
	img.blob.fill = nil
	m.check(0, len(img.blob.data))
	m.unmount()
	closedAll(t, s)
	if got := s.Stats(); got.Failed == 0 || got.Lost != 0 {
		t.Errorf("%+v", got)
	}
}

// A refused OPEN fails the mount, and leaves nothing that keeps a later one waiting.
func TestKernelRefused(t *testing.T) {
	d := kernelDevice(t, cacheRoot(t))
	img := newImage(t, "", "img4", "blob4", 64<<10)
	h := handle(img.blob)
	s := start(t, d, h, Options{})
	if _, err := tryMount(t, img); err == nil {
		t.Error("mounted")
	}
	h.mu.Lock()
	h.list[img.boot.key] = img.boot
	h.mu.Unlock()
	m := mount(t, img)
	m.check(0, len(img.blob.data))
	m.unmount()
	closedAll(t, s)
	if got := s.Stats(); got.Refused == 0 {
		t.Errorf("%+v", got)
	}
}

// Invariant 4, item 9: a successor that gets the device answers what its predecessor
// read and left, and opens what it had open.
func TestKernelRestart(t *testing.T) {
	dir := cacheRoot(t)
	d := kernelDevice(t, dir)
	img := newImage(t, "dom5", "img5", "blob5", 1<<20)
	img.blob.fill = func(ctx context.Context, _, _ int64) error { <-ctx.Done(); return ctx.Err() }
	h := handle(img.boot, img.blob)
	s := start(t, d, h, Options{Handover: true, Grace: time.Millisecond})
	m := mount(t, img)
	read := later(func() error {
		p, err := m.read(0, page)
		if err == nil && !bytes.Equal(p, img.blob.data[:page]) {
			err = errors.New("not the blob's bytes")
		}
		return err
	})
	until(t, "Fill runs", func() bool { return img.blob.active.Load() > 0 })
	other := newImage(t, "dom5", "img5b", "blob5b", 64<<10)
	other.boot.open = func(ctx context.Context, _ *blob) (Object, error) { <-ctx.Done(); return nil, ctx.Err() }
	h.mu.Lock()
	h.list[other.boot.key], h.list[other.blob.key] = other.boot, other.blob
	h.mu.Unlock()
	var mo *mounted
	mounting := later(func() (err error) { mo, err = tryMount(t, other); return err })
	until(t, "the handler is asked", func() bool { return other.boot.opens.Load() > 0 })

	var held *os.File // as another process would have it
	conn, err := d.File().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = conn.Control(func(fd uintptr) {
		dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		held = os.NewFile(uintptr(dup), "held")
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}

	img.blob.fill, other.boot.open = nil, nil
	if d, err = NewDevice(held, dir); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Restore(); err != nil {
		t.Fatal(err)
	}
	s = start(t, d, h, Options{})
	if err := get(t, read); err != nil {
		t.Error(err)
	}
	if err := get(t, mounting); err != nil {
		t.Fatal(err)
	}
	mo.check(0, len(other.blob.data))
	mo.unmount()
	m.check(0, len(img.blob.data))
	m.unmount()
	closedAll(t, s)
	if got := s.Stats(); got.Lost+got.Unknown+got.Failed != 0 {
		t.Errorf("%+v", got)
	}
	m = mount(t, img)
	m.check(0, len(img.blob.data))
	m.unmount()
	closedAll(t, s)
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}

// Item 10: the device is lost. The mount is dead, which is EIO or ENOBUFS and never
// zeros; with the same tag another daemon serves other images.
func TestKernelDeviceLost(t *testing.T) {
	dir := cacheRoot(t)
	d := kernelDevice(t, dir)
	dead, img := newImage(t, "", "img6", "blob6", 1<<20), newImage(t, "", "img7", "blob7", 1<<20)
	h := handle(dead.boot, dead.blob, img.boot, img.blob)
	s := start(t, d, h, Options{})
	lost := mount(t, dead)
	lost.check(0, page)
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := lost.read(512<<10, page); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("read of a dead mount: %v", err)
	}
	d = kernelDevice(t, dir)
	s = start(t, d, h, Options{})
	m := mount(t, img)
	m.check(0, len(img.blob.data))
	m.unmount()
	lost.unmount()
	m = mount(t, dead)
	m.check(0, len(dead.blob.data))
	m.unmount()
	closedAll(t, s)
}

// Items 7 and 8: images of a domain share their blob.
func TestKernelSharedBlob(t *testing.T) {
	d := kernelDevice(t, cacheRoot(t))
	a, b := newImage(t, "dom8", "img8a", "blob8", 1<<20), newImage(t, "dom8", "img8b", "blob8", 1<<20)
	s := start(t, d, handle(a.boot, b.boot, a.blob), Options{})
	ma, mb := mount(t, a), mount(t, b)
	ma.check(0, len(a.blob.data))
	reads := s.Stats().Reads
	mb.check(0, 64<<10)
	ma.unmount()
	mb.check(0, len(b.blob.data))
	if got := s.Stats(); got.Opens != 3 || a.blob.fills.Load() == 0 || got.Reads-reads > 4 { // the rest is metadata
		t.Errorf("%+v, %d more READs", got, got.Reads-reads)
	}
	if _, err := tryMount(t, b); err == nil {
		t.Error("an fsid was mounted twice")
	}
	mb.unmount()
	closedAll(t, s)
}

// Race 7: the kernel does not wait for the answer to a killed reader's READ.
func TestKernelKilledReader(t *testing.T) {
	d := kernelDevice(t, cacheRoot(t))
	img := newImage(t, "", "img9", "blob9", 1<<20)
	hold := make(chan struct{})
	img.blob.fill = func(_ context.Context, off, n int64) error { <-hold; return img.blob.write(off, n) }
	s := start(t, d, handle(img.boot, img.blob), Options{})
	m := mount(t, img)
	reader, done := run(t, "read", erofs.MountOptions{Source: filepath.Join(m.dir, "data")})
	until(t, "Fill runs", func() bool { return img.blob.active.Load() > 0 })
	if err := reader.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := get(t, done); err == nil {
		t.Error("the reader was not killed")
	}
	close(hold)
	m.check(0, len(img.blob.data))
	m.unmount()
	closedAll(t, s)
	if got := s.Stats(); got.Lost == 0 {
		t.Errorf("%+v", got)
	}
}

// Invariant 7: what WriteAt refuses is what 6.1 puts at another place without an
// error.
func TestKernelUnalignedWrite(t *testing.T) {
	d := kernelDevice(t, cacheRoot(t))
	img := newImage(t, "", "img10", "blob10", 1<<20)
	s := start(t, d, handle(img.boot, img.blob), Options{})
	m := mount(t, img)
	until(t, "the blob is opened", func() bool { return img.blob.file.Load() != nil })
	f := img.blob.file.Load()
	data := func() (runs [][2]int64) {
		if err := f.Data(1<<20, func(off, end int64) { runs = append(runs, [2]int64{off, end}) }); err != nil {
			t.Fatal(err)
		}
		return runs
	}
	p, free, err := AlignedBuffer(2 * page)
	if err != nil {
		t.Fatal(err)
	}
	defer free()
	copy(p, img.blob.data[512<<10:])
	for name, w := range map[string]struct {
		p   []byte
		off int64
	}{
		"offset": {p[:page], 512<<10 + 512}, "length": {p[:512], 512 << 10}, "memory": {p[512 : 512+page], 512 << 10},
	} {
		if n, err := f.WriteAt(w.p, w.off); n != 0 || !errors.Is(err, ErrAlign) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	if runs := data(); len(runs) != 0 {
		t.Errorf("data at %v after writes that were refused", runs)
	}
	n, err := unix.Pwrite(f.FD(), p[:page], 512<<10+512)
	t.Logf("the kernel itself, for a page at 512 past a page: %d, %v, data at %v", n, err, data())
	if err == nil && len(data()) == 1 && data()[0][0] == 512<<10 {
		t.Log("it was put 512 bytes too early")
	}
	m.check(0, 256<<10)
	m.unmount()
	closedAll(t, s)
}

// smallDir is a small file system, which the tests may fill or make read-only.
func smallDir(t *testing.T) string {
	t.Helper()
	cacheRoot(t) // for its gates
	dir := os.Getenv("EROFSD_TEST_SMALL_DIR")
	if dir == "" {
		testenv.Need(t, "small-dir", "needs a small file system in EROFSD_TEST_SMALL_DIR")
	}
	return dir
}

func TestKernelReadOnly(t *testing.T) {
	dir := smallDir(t)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
			t.Error(err)
		}
	}()
	d, err := Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Bind(BindOptions{Dir: dir}); !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("bind: %v", err)
	}
}

// Item 12: the disk is full. The writer learns that, the reader gets EIO, and with
// room again all is well: the cache lives on.
func TestKernelDiskFull(t *testing.T) {
	dir := smallDir(t)
	d := kernelDevice(t, dir)
	img := newImage(t, "", "img11", "blob11", 1<<20)
	var failed atomic.Value
	img.blob.fill = func(_ context.Context, off, n int64) error {
		err := img.blob.write(off, n)
		if err != nil {
			failed.Store(err)
		}
		return err
	}
	s := start(t, d, handle(img.boot, img.blob), Options{})
	m := mount(t, img)
	m.check(0, page)
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(ballast)
	defer f.Close()
	for n := 1 << 20; n >= page; {
		if _, err := f.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.read(512<<10, 64<<10); !errors.Is(err, unix.EIO) {
		t.Errorf("read with a full disk: %v", err)
	}
	if err, _ := failed.Load().(error); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("WriteAt with a full disk: %v", err)
	}
	until(t, "the kernel wants something culled", func() bool {
		_, _ = m.read(512<<10, page)
		return s.Stats().PollCull > 0
	})
	m.check(0, page)
	if err := errors.Join(f.Close(), os.Remove(ballast)); err != nil {
		t.Fatal(err)
	}
	m.check(0, len(img.blob.data))
	m.unmount()
	closedAll(t, s)
	cullVolume(t, d, img)
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}
