package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A fakeDaemon mounts bootstraps that are whole file systems, and keeps the rules of the
// real one: no mount without a binding, no removal of what is bound or mounted.
type fakeDaemon struct {
	mu     sync.Mutex
	bound  map[string]api.BindRequest
	mounts map[string]string // key by place
	kept   map[string]bool
	calls  []string
	down   error                // of every call
	dies   map[string]int       // by call: how often its worker ends below that
	usage  api.Usage            // of those that are not in usages
	usages map[string]api.Usage // by key
	wanted []api.PrefetchRequest
	denied map[string]bool // by key: its login is refused

	urgent  string        // an image that is bound also while it hangs
	hung    chan struct{} // nil: not
	waiting atomic.Int32  // calls that hang
}

// hang has calls wait until wake or their caller leaves.
func (d *fakeDaemon) hang() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hung = make(chan struct{})
}

func (d *fakeDaemon) wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hung != nil {
		close(d.hung)
		d.hung = nil
	}
}

// await waits while it hangs.
func (d *fakeDaemon) await(ctx context.Context) error {
	d.mu.Lock()
	hung := d.hung
	d.mu.Unlock()
	if hung == nil {
		return nil
	}
	d.waiting.Add(1)
	defer d.waiting.Add(-1)
	select {
	case <-hung:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// newFake returns one whose mounts end with t.
func newFake(t *testing.T) *fakeDaemon {
	t.Helper()
	testenv.Root(t)
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(t.TempDir()))
	return &fakeDaemon{bound: map[string]api.BindRequest{}, mounts: map[string]string{}, kept: map[string]bool{}, denied: map[string]bool{}}
}

func keyOf(domain, image string) string { return domain + "/" + image }

func (d *fakeDaemon) call(name string) error {
	d.calls = append(d.calls, name)
	if d.dies[name] > 0 {
		d.dies[name]--
		return fmt.Errorf("ask daemon: read: %w", syscall.ECONNRESET)
	}
	return d.down
}

func (d *fakeDaemon) setDown(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.down = err
}

// count is how often something was called.
func (d *fakeDaemon) count(name string) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.calls {
		if c == name {
			n++
		}
	}
	return n
}

func (d *fakeDaemon) BindImage(ctx context.Context, r api.BindRequest) error {
	d.mu.Lock()
	urgent := r.ID == d.urgent
	d.mu.Unlock()
	if !urgent {
		if err := d.await(ctx); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call("bind"); err != nil {
		return err
	}
	if _, err := os.Stat(r.Bootstrap); err != nil {
		return api.BadRequest(err)
	}
	d.bound[keyOf(r.DomainID, r.ID)] = r
	d.kept[keyOf(r.DomainID, r.ID)] = true
	return nil
}

func (d *fakeDaemon) Mount(_ context.Context, r api.MountRequest) (api.Mount, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call("mount"); err != nil {
		return api.Mount{}, err
	}
	b, ok := d.bound[keyOf(r.DomainID, r.Image)]
	if !ok {
		return api.Mount{}, api.NotFound(errors.New("not bound"))
	}
	if err := syscall.Mount(b.Bootstrap, r.Mountpoint, "erofs", syscall.MS_RDONLY, ""); err != nil {
		return api.Mount{}, api.BadRequest(err)
	}
	d.mounts[r.Mountpoint] = keyOf(r.DomainID, r.Image)
	return api.Mount{Mountpoint: r.Mountpoint, ID: r.Image}, nil
}

func (d *fakeDaemon) Unmount(ctx context.Context, r api.UnmountRequest) error {
	if err := d.await(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call("unmount"); err != nil {
		return err
	}
	if _, ok := d.mounts[r.Mountpoint]; !ok {
		return api.NotFound(errors.New("not mounted"))
	}
	if err := syscall.Unmount(r.Mountpoint, 0); err != nil {
		return api.Conflict(err)
	}
	delete(d.mounts, r.Mountpoint)
	return nil
}

func (d *fakeDaemon) UnbindImage(ctx context.Context, r api.ImageRequest) error {
	if err := d.await(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call("unbind"); err != nil {
		return err
	}
	key := keyOf(r.DomainID, r.Image)
	if _, ok := d.bound[key]; !ok {
		return api.NotFound(errors.New("not bound"))
	}
	delete(d.bound, key)
	return nil
}

func (d *fakeDaemon) Remove(ctx context.Context, r api.RemoveRequest) error {
	if err := d.await(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.call("remove"); err != nil {
		return err
	}
	key := keyOf(r.DomainID, r.Image)
	_, bound := d.bound[key]
	for point, k := range d.mounts {
		if k == key && !isImage(point) {
			delete(d.mounts, point) // somebody else has unmounted it
			continue
		}
		bound = bound || k == key
	}
	switch {
	case bound:
		return api.Conflict(errors.New("in use"))
	case !d.kept[key]:
		return api.NotFound(errors.New("nothing is kept"))
	}
	delete(d.kept, key)
	return nil
}

func (d *fakeDaemon) Prefetch(_ context.Context, r api.PrefetchRequest) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wanted = append(d.wanted, r)
	return d.call("prefetch")
}

func (d *fakeDaemon) Usage(_ context.Context, r api.ImageRequest) (api.Usage, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if u, ok := d.usages[keyOf(r.DomainID, r.Image)]; ok {
		return u, d.call("usage")
	}
	return d.usage, d.call("usage")
}

func (d *fakeDaemon) Status(context.Context) (st api.Status, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for point, key := range d.mounts {
		domain, id, _ := strings.Cut(key, "/")
		st.Images = append(st.Images, api.Mount{Mountpoint: point, ID: id, DomainID: domain, Blobs: []api.Blob{{Denied: d.denied[key]}}})
	}
	return st, d.call("status")
}

// empty reports whether it has nothing of any image.
func (d *fakeDaemon) empty() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.bound)+len(d.mounts)+len(d.kept) == 0
}

// end unmounts everything.
func (d *fakeDaemon) end() error {
	var errs []error
	for point := range d.mounts {
		errs = append(errs, syscall.Unmount(point, syscall.MNT_DETACH))
	}
	return errors.Join(errs...)
}

// anywhere is a source without a configuration.
func anywhere(_ context.Context, reference string) (Origin, error) {
	text, err := json.Marshal(reference)
	return Origin{Config: text}, err
}

// bootstrapOf makes a file system with a file called hello that says text.
func bootstrapOf(t *testing.T, text string) []byte {
	t.Helper()
	mkfs := testenv.Tool(t, "mkfs.erofs")
	dir := t.TempDir()
	src, image := filepath.Join(dir, "src"), filepath.Join(dir, "image")
	if err := os.Mkdir(src, 0o751); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(src, 5, 6); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "hello"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-T0", "-U00000000-0000-0000-0000-000000000000", image, src).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
	p, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// order checks that of the first calls of each name.
func (d *fakeDaemon) order(t *testing.T, names ...string) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	last := -1
	for _, name := range names {
		i := slices.Index(d.calls, name)
		if i <= last {
			t.Errorf("calls %q: want %q in this order", d.calls, names)
			return
		}
		last = i
	}
}
