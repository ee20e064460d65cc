package rounds

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/snapshotter"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	imageCount = 200
	roundCount = 1000
	warmUp     = 200 // rounds after which nothing may grow
)

// A size is what snapshotter (this process) and daemon take.
type size struct {
	goroutines, files, daemonFiles, mounts int

	heap, daemon int64 // bytes
}

// TestRounds prepares, mounts, reads, unmounts and removes containers of 200 lazy images, 1 000
// times. Neither memory nor anything that is counted grows, and in the end nothing is left.
func TestRounds(t *testing.T) {
	r := newRig(t)
	for i, image := range r.images {
		names, err := harness.PullLocal(t.Context(), r.Snapshotter, fmt.Sprint(i), image)
		if err != nil {
			t.Fatal(err)
		}
		r.names = append(r.names, names)
	}
	seed := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	var before size
	for n := range roundCount {
		i := rnd.IntN(imageCount)
		if n < imageCount { // each of them at least once
			i = n
		}
		if err := r.round(t.Context(), i); err != nil {
			t.Fatalf("round %d: %v", n, err)
		}
		if n+1 == warmUp {
			before = r.size(t)
		}
	}
	after := r.size(t)
	t.Logf("after %d rounds %+v, after %d %+v", warmUp, before, roundCount, after)
	if before.mounts != imageCount || after.mounts != imageCount {
		t.Errorf("%d and %d images are mounted, want %d", before.mounts, after.mounts, imageCount)
	}
	for _, c := range []struct {
		what          string
		before, after int
		more          int // that may come and go
	}{
		{"goroutines", before.goroutines, after.goroutines, 8},
		{"open files", before.files, after.files, 8},
		{"the daemon's open files", before.daemonFiles, after.daemonFiles, 8},
		{"MiB of the heap", int(before.heap >> 20), int(after.heap >> 20), 4},
		{"MiB of the daemon", int(before.daemon >> 20), int(after.daemon >> 20), 24},
	} {
		if c.after > c.before+c.more {
			t.Errorf("%s: %d after %d rounds, %d after %d", c.what, c.before, warmUp, c.after, roundCount)
		}
	}
	if left := r.directories(t); left != 2*imageCount {
		t.Errorf("%d directories, want %d", left, 2*imageCount)
	}
	r.removeAll(t)
}

// A rig is a snapshotter with a real daemon.
type rig struct {
	*snapshotter.Snapshotter
	daemon *harness.Daemon
	root   string // of the snapshotter
	point  string // where containers are mounted
	images []api.MountRequest
	names  [][]string // of their snapshots
}

func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
	bin := filepath.Join(dir, "bin")
	cmd := exec.Command("go", "build", "-o", bin+"/", "./cmd/erofsd")
	cmd.Dir = testenv.ModuleRoot(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	r := &rig{root: filepath.Join(dir, "snapshots"), point: filepath.Join(dir, "container")}
	if err := os.Mkdir(r.point, 0o755); err != nil {
		t.Fatal(err)
	}
	r.makeImages(t, dir)
	var err error
	if r.daemon, err = harness.StartDaemon(t.Context(), bin, filepath.Join(dir, "cache"), "--no-completion"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.daemon.Stop(); err != nil {
			t.Error(err)
		}
	})
	if r.Snapshotter, err = snapshotter.New(r.root, r.daemon.Client, harness.Locally); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// makeImages makes images of which no two are the same; hello in each says its number.
func (r *rig) makeImages(t *testing.T, dir string) {
	t.Helper()
	src := filepath.Join(dir, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range imageCount {
		image := filepath.Join(dir, "images", fmt.Sprint(i))
		if err := os.WriteFile(filepath.Join(src, "hello"), text(i), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := convert.ConvertToDir(t.Context(), src, image, convert.Options{}); err != nil {
			t.Fatal(err)
		}
		r.images = append(r.images, api.MountRequest{Bootstrap: filepath.Join(image, "image.boot"), BlobDir: filepath.Join(image, "blobs")})
	}
}

// text is what hello of an image says: more than metadata have room for.
func text(i int) []byte {
	p := make([]byte, 10_000)
	for n := range p {
		p[n] = fmt.Sprintf("image %8d\n", i)[n%15]
	}
	return p
}

// round runs a container of an image.
func (r *rig) round(ctx context.Context, i int) error {
	m, err := r.Prepare(ctx, "container", r.names[i][0])
	if err != nil {
		return err
	}
	if err := mount.All(m, r.point); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(r.point, "hello"))
	if err == nil && string(got) != string(text(i)) {
		err = fmt.Errorf("image %d has %d wrong bytes", i, len(got))
	}
	return errors.Join(err, mount.UnmountAll(r.point, 0), r.Remove(ctx, "container"))
}

func (r *rig) size(t *testing.T) size {
	t.Helper()
	if err := r.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	s := size{goroutines: runtime.NumGoroutine(), files: entries(t, "/proc/self/fd"), heap: int64(m.HeapAlloc)}
	v, err := r.daemon.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.daemonFiles = entries(t, fmt.Sprintf("/proc/%d/fd", v.PID))
	if s.daemon, err = r.daemon.Memory("VmRSS"); err != nil {
		t.Fatal(err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(r.root))
	if err != nil {
		t.Fatal(err)
	}
	s.mounts = len(mounts)
	return s
}

func entries(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// directories counts what there is of snapshots.
func (r *rig) directories(t *testing.T) (n int) {
	t.Helper()
	for _, name := range []string{"snapshots", "new", "trash"} {
		n += entries(t, filepath.Join(r.root, name))
	}
	return n
}

// removeAll removes all images; nothing of them is left.
func (r *rig) removeAll(t *testing.T) {
	t.Helper()
	for _, names := range r.names {
		for _, name := range names {
			if err := r.Remove(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
	}
	var st api.Status
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := r.Cleanup(t.Context())
		var statusErr error
		st, statusErr = r.daemon.Status(t.Context())
		if err = errors.Join(err, statusErr); err == nil && len(st.Images)+len(st.Kept)+r.directories(t) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d images are mounted, %d kept, %d directories there: %v", len(st.Images), len(st.Kept), r.directories(t), err)
		}
	}
	if s := r.size(t); s.mounts != 0 || st.CacheBytes != 0 {
		t.Errorf("%d mounts and %d bytes of the cache are left", s.mounts, st.CacheBytes)
	}
}
