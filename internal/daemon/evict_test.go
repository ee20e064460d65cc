package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// evictGrace is the grace of these tests: readers are on their way for as long as this
// machine makes them, which is busy.
const evictGrace = time.Second

// A randomImage is an image of one file of random bytes and one program.
type randomImage struct {
	api.MountRequest
	data []byte
}

func newRandomImage(t testing.TB, r *rand.Rand, size int) *randomImage {
	t.Helper()
	tree := t.TempDir()
	x := &randomImage{data: make([]byte, size)}
	for i := range x.data {
		x.data[i] = byte(r.Uint32())
	}
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(tree, "data"), x.data, 0o644), os.WriteFile(filepath.Join(tree, "true"), program, 0o755)); err != nil {
		t.Fatal(err)
	}
	x.MountRequest = converted(t, tree)
	return x
}

var errWrongBytes = errors.New("wrong bytes")

// A dropReader reads a file and drops it from EROFS's page cache, or the kernel would not
// ask again.
type dropReader struct {
	x *randomImage
	f *os.File
	r *rand.Rand
}

func (d *dropReader) drop() error {
	return unix.Fadvise(int(d.f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// read reads a random range.
func (d *dropReader) read() error {
	off := d.r.Int64N(int64(len(d.x.data)))
	n := min(1+d.r.Int64N(200<<10), int64(len(d.x.data))-off)
	p := make([]byte, n)
	if _, err := d.f.ReadAt(p, off); err != nil {
		return err
	}
	if !bytes.Equal(p, d.x.data[off:off+n]) {
		return fmt.Errorf("%w in %d+%d of %s", errWrongBytes, off, n, d.f.Name())
	}
	return d.drop()
}

// fault reads some pages of it by page faults.
func (d *dropReader) fault() (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("page fault: %v", p)
		}
	}()
	p, err := unix.Mmap(int(d.f.Fd()), 0, len(d.x.data), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(p)
	for range 20 {
		off := d.r.IntN(len(p) - 4096)
		if !bytes.Equal(p[off:off+4096], d.x.data[off:off+4096]) {
			return fmt.Errorf("%w by page fault at %d of %s", errWrongBytes, off, d.f.Name())
		}
	}
	return errors.Join(unix.Madvise(p, unix.MADV_DONTNEED), d.drop())
}

// run runs the image's program, by a shell: a child that waits for the pages of what it is
// to execute holds a copy of every file that this process has open.
func (d *dropReader) run() error {
	name := filepath.Join(filepath.Dir(d.f.Name()), "true")
	if out, err := exec.Command("/bin/sh", "-c", name).CombinedOutput(); err != nil {
		return fmt.Errorf("run %s: %w: %s", name, err, out)
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
}

// reads reads x at mountpoint in one way or another until ctx ends.
func (x *randomImage) reads(ctx context.Context, mountpoint string, r *rand.Rand) error {
	f, err := os.Open(filepath.Join(mountpoint, "data"))
	if err != nil {
		return err
	}
	defer f.Close()
	d := &dropReader{x, f, r}
	for ctx.Err() == nil {
		switch r.IntN(8) {
		case 0:
			err = d.fault()
		case 1:
			err = d.run()
		default:
			err = d.read()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// cacheDisk returns what the cache files take.
func cacheDisk(t testing.TB, root string) (n int64) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(root, "cache", "*"))
	if err != nil {
		t.Error(err)
	}
	for _, name := range names {
		var st syscall.Stat_t
		if filepath.Ext(name) == "" && syscall.Lstat(name, &st) == nil {
			n += st.Blocks * 512
		}
	}
	return n
}

// needFanotify skips t where the kernel cannot do it.
func needFanotify(t testing.TB) {
	t.Helper()
	testenv.Root(t)
	if err := fanotify.Supported(rootParent()); err != nil {
		testenv.Kernel(t, "fanotify", err)
	}
}

// readingTime is $MINUTES, or ten seconds.
func readingTime(t testing.TB) time.Duration {
	t.Helper()
	s := os.Getenv("MINUTES")
	if s == "" {
		return 10 * time.Second
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(n * float64(time.Minute))
}

// TestEvictUnderReaders: three images are read all the time, and the cache has room for
// one and a pinned one. No reader gets a wrong byte or an error; the cache stays within its limit;
// what is pinned stays.
func TestEvictUnderReaders(t *testing.T) {
	needFanotify(t)
	const mib = 1 << 20
	const pinnedSize, size, high, low = 4 * mib, 24 * mib, 36 * mib, 24 * mib
	const oneFetch = 4 * mib
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	d := startDaemon(t, daemonOptions{completion: true, high: high, low: low, grace: evictGrace})

	pinned := newRandomImage(t, r, pinnedSize)
	pinned.Pinned = true
	p := d.mount(t, pinned.MountRequest)
	if got, err := os.ReadFile(filepath.Join(p, "data")); err != nil || !bytes.Equal(got, pinned.data) {
		t.Fatalf("the pinned image: %v", err)
	}
	await(t, "completion", func() bool { return d.image(t, p).Complete })
	asked := d.image(t, p).BackendRequests

	var images []*randomImage
	for range 3 {
		images = append(images, newRandomImage(t, r, size))
	}
	ctx, stop := context.WithTimeout(t.Context(), readingTime(t))
	defer stop()
	var wg sync.WaitGroup
	most := int64(0)
	wg.Go(func() {
		for ctx.Err() == nil {
			most = max(most, cacheDisk(t, d.root))
			time.Sleep(5 * time.Millisecond)
		}
	})
	for i, x := range images {
		m := d.mount(t, x.MountRequest)
		for range 5 {
			mine := rand.New(rand.NewPCG(r.Uint64(), 1))
			wg.Go(func() {
				if err := x.reads(ctx, m, mine); err != nil {
					t.Errorf("image %d: %v", i, err)
					stop()
				}
			})
		}
		name := fmt.Sprint("shares-", i)
		bind := api.BindRequest{ID: name, Bootstrap: x.Bootstrap, Config: localConfig(t, name, x.BlobDir, "")}
		if err := d.BindImage(t.Context(), bind); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { d.remounts(ctx, t, name, x, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	wg.Wait()
	st, err := d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("evicted %d MiB; the cache took %d MiB at most; %d kernel events, %d denied", st.CacheEvicted>>20, most>>20, st.Kernel.Events, st.Kernel.Denied)
	if st.CacheEvicted < size {
		t.Errorf("only %d bytes were evicted", st.CacheEvicted)
	}
	if most < size || most > high+oneFetch {
		t.Errorf("the cache took %d bytes at most, want %d at least once, and never more than %d", most, size, high+oneFetch)
	}
	if st.Kernel.Denied > 0 {
		t.Errorf("%d reads were denied", st.Kernel.Denied)
	}
	if s := d.image(t, p); !s.Complete || s.BackendRequests != asked {
		t.Errorf("the pinned image has changed: %+v", s)
	}
	if t.Failed() {
		t.Logf("%s", d.log)
	}
}

// remounts mounts x again, as it is or as an image of another name that shares its blob,
// reads some of it and unmounts it, until ctx ends.
func (d *testDaemon) remounts(ctx context.Context, t *testing.T, name string, x *randomImage, r *rand.Rand) {
	for ctx.Err() == nil {
		again := x.MountRequest
		if r.IntN(2) == 0 {
			again = api.MountRequest{Image: name}
		}
		m := d.mount(t, again)
		once, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		if err := x.reads(once, m, r); err != nil {
			t.Errorf("a second mount: %v", err)
		}
		cancel()
		afterForks()
		d.umount(t, m)
	}
}

// afterForks waits until no child that has not executed its program yet has a copy of the
// files that this process has closed.
func afterForks() {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
}

// TestEvictedIsMarkedAgain: what is read of a complete image after some of it was evicted
// is asked for again, and no more once it is complete.
func TestEvictedIsMarkedAgain(t *testing.T) {
	needFanotify(t)
	const size = 12 << 20
	r := rand.New(rand.NewPCG(1, 2))
	d := startDaemon(t, daemonOptions{completion: true, high: 20 << 20, low: 18 << 20, grace: evictGrace})
	old, other := newRandomImage(t, r, size), newRandomImage(t, r, size)
	m := d.mount(t, old.MountRequest)
	reader := func(m string, x *randomImage) *dropReader {
		f, err := os.Open(filepath.Join(m, "data"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return &dropReader{x, f, r}
	}
	f := reader(m, old)
	all := func(f *dropReader) {
		t.Helper()
		if err := f.drop(); err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(io.NewSectionReader(f.f, 0, size))
		if err != nil || !bytes.Equal(p, f.x.data) {
			t.Fatalf("wrong bytes, %v\n%s", err, d.log)
		}
	}
	all(f)
	await(t, "completion", func() bool { return d.image(t, m).Complete })
	quiet := func() bool {
		before := d.image(t, m).KernelEvents
		all(f)
		return d.image(t, m).KernelEvents == before
	}
	await(t, "the end of events", quiet)

	n := d.mount(t, other.MountRequest)
	second := reader(n, other)
	all(second)
	await(t, "eviction", func() bool {
		st, err := d.Status(t.Context())
		return err == nil && st.CacheEvicted > 0 && !d.image(t, m).Complete
	})
	second.f.Close()
	d.umount(t, n)
	if quiet() {
		t.Error("the kernel does not ask for what was evicted")
	}
	await(t, "room", func() bool { // or the daemon has made it
		err := d.Remove(t.Context(), api.RemoveRequest{Image: other.Bootstrap})
		return err == nil || status(err) == http.StatusNotFound
	})
	all(f)
	await(t, "completion again", func() bool { all(f); return d.image(t, m).Complete })
	await(t, "the end of events again", quiet)
}

// TestKilledWhileEvicting: readers of a daemon that is killed between two holes get EIO,
// never zeros, and a new daemon finds right bytes only.
func TestKilledWhileEvicting(t *testing.T) {
	needFanotify(t)
	const size = 16 << 20
	r := rand.New(rand.NewPCG(3, 4))
	o := daemonOptions{root: newRoot(t), high: 20 << 20, low: 10 << 20, grace: evictGrace / 4}
	var images []*randomImage
	for range 2 {
		images = append(images, newRandomImage(t, r, size))
	}
	for range 3 {
		d := startDaemon(t, o)
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		var wg sync.WaitGroup
		var points []string
		for _, x := range images {
			m := d.mount(t, x.MountRequest)
			points = append(points, m)
			for range 3 {
				mine := rand.New(rand.NewPCG(r.Uint64(), 1))
				wg.Go(func() {
					if err := x.reads(ctx, m, mine); errors.Is(err, errWrongBytes) { // others are EIO in some form
						t.Error(err)
					}
				})
			}
		}
		await(t, "eviction", func() bool {
			st, err := d.Status(t.Context())
			return err == nil && st.CacheEvicted > 0
		})
		d.kill()
		for i, m := range points {
			p, err := readAll(filepath.Join(m, "data"))
			if !bytes.Equal(p, images[i].data[:len(p)]) {
				t.Errorf("wrong bytes after the daemon's death, %v", err)
			}
		}
		stop()
		wg.Wait()
		for _, m := range points {
			if err := syscall.Unmount(m, 0); err != nil {
				t.Fatal(err)
			}
		}
		awaitUnlocked(t, o.root)
	}
	d := startDaemon(t, o)
	for _, x := range images {
		m := d.mount(t, x.MountRequest)
		if p, err := readAll(filepath.Join(m, "data")); err != nil || !bytes.Equal(p, x.data) {
			t.Errorf("wrong bytes after a restart, %v", err)
		}
		d.umount(t, m)
	}
}

// awaitUnlocked waits until the guard of a dead daemon has ended.
func awaitUnlocked(t *testing.T, root string) {
	t.Helper()
	await(t, "the guard's end", func() bool {
		f, err := lockRoot(root)
		if err == nil {
			f.Close()
		}
		return err == nil
	})
}
