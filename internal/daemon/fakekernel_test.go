package daemon

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A inProcess runs in this process, on cachefilestest's kernel.
type inProcess struct {
	*Daemon
	k   *cachefilestest.Kernel
	t   *cachefilesTransport
	log *testenv.Buffer
}

// startFake starts a daemon, which ends with the test. An inherited device is one that
// another daemon has had.
func startFake(t testing.TB, inherited bool) *inProcess {
	t.Helper()
	k, log := cachefilestest.New(t), &testenv.Buffer{}
	d, err := New(Options{
		Root: filepath.Join(t.TempDir(), "root"), Transport: Cachefiles, NoCompletion: true, FillTimeout: 20 * time.Second,
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Kernel: FakeKernel{Device: k.Device(), Inherited: inherited, Mounter: &fakeMounter{k: k, open: map[string][]*cachefilestest.Object{}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		done, cancel := context.WithCancel(context.Background())
		cancel()
		if err := d.end(done, done); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", log)
		}
	})
	if err := d.begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &inProcess{Daemon: d, k: k, t: d.kernel.(*cachefilesTransport), log: log}
}

// fixture returns a request for the image of that name, and its key.
func (d *inProcess) fixture(t testing.TB, name string) (mountRequest, imageKey) {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), name)
	r := mountRequest{MountRequest: api.MountRequest{
		Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: filepath.Join(dir, "blobs"), Mountpoint: t.TempDir(),
	}}
	f, err := os.Open(r.Bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id, err := bootstrapID(f)
	if err != nil {
		t.Fatal(err)
	}
	return r, imageKey{id: id}
}

// acquired opens the image of r.
func (d *inProcess) acquired(t testing.TB, r mountRequest) *image {
	t.Helper()
	src, err := d.resolve(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	img, err := d.acquire(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// open has the kernel open the object of k.
func (d *inProcess) open(t testing.TB, k cachefiles.Key) *cachefilestest.Object {
	t.Helper()
	o, err := d.k.Open(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// newest is the file of the newest object of k, nil if there is none.
func (d *inProcess) newest(k cachefiles.Key) *cachefiles.File {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	return d.t.files[k]
}

// A fakeMounter mounts as EROFS does: it opens the bootstrap and the blobs, and reads the
// superblock.
type fakeMounter struct {
	k *cachefilestest.Kernel

	mu      sync.Mutex // guards what follows
	open    map[string][]*cachefilestest.Object
	mounted []Mounted
}

func (m *fakeMounter) Mount(ctx context.Context, s MountSpec) error {
	if s.Clone != nil {
		return syscall.ENOSYS
	}
	var open []*cachefilestest.Object
	for _, cookie := range append([]string{s.FSID}, s.Cookies...) {
		o, err := m.k.Open(ctx, cachefiles.Key{Volume: cachefiles.VolumeKey(s.Domain, s.FSID), Cookie: cookie})
		if err == nil && cookie == s.FSID {
			err = o.ReadAt(ctx, make([]byte, 4096), 0)
		}
		if err != nil {
			return err
		}
		open = append(open, o)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open[s.Target.Name()] = open
	m.mounted = append(m.mounted, Mounted{Point: s.Target.Name(), Source: s.Bootstrap.Name()})
	return nil
}

func (m *fakeMounter) Unmount(_ context.Context, point string, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.open[point] {
		o.Close()
	}
	delete(m.open, point)
	for i, x := range m.mounted {
		if x.Point == point {
			m.mounted = append(m.mounted[:i], m.mounted[i+1:]...)
			return nil
		}
	}
	return syscall.EINVAL
}

func (m *fakeMounter) Mounted() ([]Mounted, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]Mounted(nil), m.mounted...), nil
}
