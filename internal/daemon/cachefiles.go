package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// defaultDomain is the domain of images that ask for none: they share their blobs,
// and the kernel has one directory for all of them.
const defaultDomain = "erofsd"

// A cachefilesTransport answers for the objects of on-demand cachefiles: the
// bootstrap of each image, by the image's id, and each blob, by its own.
type cachefilesTransport struct {
	d         *Daemon
	device    *cachefiles.Device
	server    *cachefiles.Server
	inherited bool // the device has served an earlier daemon

	mu      sync.Mutex // guards what follows; Daemon.mu may be held before it
	objects map[cachefiles.Key]served
	bound   map[cachefiles.Key][]*binding
	open    map[cachefiles.Key]int              // objects of the kernel that are not closed
	files   map[cachefiles.Key]*cachefiles.File // of the newest of them
}

// A served is what is behind a key: a bootFile, or a device.
type served interface {
	Size() int64
	// attach makes f the file that Fill fills; again it costs next to nothing.
	attach(ctx context.Context, f *cachefiles.File) error
	Fill(ctx context.Context, off, n int64) error
	detach(f *cachefiles.File)
}

// Size is the size of the blob's cache file.
func (v *device) Size() int64 { return v.blob.Size() }

func (v *device) attach(ctx context.Context, f *cachefiles.File) error {
	return v.blob.Attach(ctx, f)
}

func (v *device) detach(f *cachefiles.File) { v.blob.Detach(f) }

func startCachefiles(d *Daemon) (_ transport, err error) {
	t := &cachefilesTransport{
		d: d, device: d.o.Kernel.Device,
		objects: map[cachefiles.Key]served{}, bound: map[cachefiles.Key][]*binding{},
		open: map[cachefiles.Key]int{}, files: map[cachefiles.Key]*cachefiles.File{},
	}
	switch {
	case t.device != nil: // bound by whoever made it
		t.inherited = d.o.Kernel.Inherited
	case d.o.Device != nil:
		t.inherited = true
		t.device, err = cachefiles.NewDevice(d.o.Device, d.o.cacheDir())
	default:
		t.device, err = openDevice(d.o)
	}
	if err != nil {
		return nil, err
	}
	if err := d.o.Holder.put(d.ctx, heldDevice, nil, t.device.File()); err != nil {
		return nil, errors.Join(err, t.device.Close())
	}
	d.log.Info(fmt.Sprintf("Create fscache instance at %s with tag %s, %d working threads", // nydusd's words
		t.device.Dir(), cmp.Or(d.o.FscacheTag, "<none>"), d.o.FillThreads))
	t.server = cachefiles.NewServer(t.device, t, cachefiles.Options{
		Logger: d.log, Deadline: d.o.FillTimeout, MaxInFlight: d.o.FillThreads, Handover: d.o.Handover || d.o.Holder != nil,
		Observer: d.measured.cachefiles,
	})
	return t, nil
}

// openDevice opens and binds the device. A directory that the user has named must exist.
func openDevice(o Options) (*cachefiles.Device, error) {
	device, err := cachefiles.Open("")
	if err != nil {
		return nil, err
	}
	if o.Fscache == "" {
		err = privateDir(o.cacheDir())
	}
	if err == nil {
		err = device.Bind(cachefiles.BindOptions{Dir: o.cacheDir(), Tag: o.FscacheTag})
	}
	if err != nil {
		return nil, errors.Join(err, device.Close())
	}
	return device, nil
}

func (t *cachefilesTransport) name() string { return Cachefiles }

func (t *cachefilesTransport) serve(ctx context.Context) error { return t.server.Serve(ctx) }

func (t *cachefilesTransport) fd() *os.File { return t.device.File() }

func (t *cachefilesTransport) stats() api.Kernel {
	s := t.server.Stats()
	return api.Kernel{Events: s.Requests, Denied: s.Refused + s.Failed, InFlight: s.InFlight, Malformed: s.Malformed}
}

// leave ends the server, which with a holder leaves what is unanswered to restore.
func (t *cachefilesTransport) leave(stop context.CancelFunc) { stop() }

func (t *cachefilesTransport) close(bool) error { return t.device.Close() }

func (t *cachefilesTransport) completed(*device) {}

// domain is the kernel's domain_id of k.
func (k imageKey) kernelDomain() string {
	if k.domain == "" {
		return defaultDomain
	}
	return k.domain
}

func (k imageKey) object(cookie string) cachefiles.Key {
	return cachefiles.Key{Volume: cachefiles.VolumeKey(k.kernelDomain(), k.id), Cookie: cookie}
}

// add makes img's keys known. The kernel may have opened some of them before, for a bound
// image.
func (t *cachefilesTransport) add(ctx context.Context, img *image) error {
	st, err := img.boot.Stat()
	if err != nil {
		return fmt.Errorf("open bootstrap: %w", err)
	}
	objects := map[cachefiles.Key]served{img.key.object(img.key.id): newBootFile(img.boot, st.Size())}
	for _, v := range img.devices {
		objects[img.key.object(v.blob.ID())] = v
	}
	for k := range objects {
		if err := k.Validate(); err != nil {
			return err
		}
	}
	files := map[cachefiles.Key]*cachefiles.File{}
	t.mu.Lock()
	for k, o := range objects {
		t.objects[k] = o
		if f := t.files[k]; f != nil {
			files[k] = f
		}
	}
	t.mu.Unlock()
	for k, f := range files {
		// The kernel may be about to close it, because a mount has failed that a daemon
		// before us began. It opens it anew for ours.
		if err := objects[k].attach(ctx, f); err != nil && !errors.Is(err, cachefiles.ErrWithdrawn) {
			return err
		}
	}
	return nil
}

// keys returns the keys that b answers for, its bootstrap's first.
func (b *binding) keys() []cachefiles.Key {
	keys := []cachefiles.Key{b.key.object(b.key.id)}
	for _, e := range b.blobs {
		keys = append(keys, b.key.object(e.ID))
	}
	return keys
}

// sizeOf returns the size of the object of b that is called cookie.
func (b *binding) sizeOf(cookie string) int64 {
	for _, e := range b.blobs {
		if e.ID == cookie {
			return e.Size
		}
	}
	return b.boot.Size()
}

func (t *cachefilesTransport) bind(b *binding) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range b.keys() {
		t.bound[k] = append(t.bound[k], b)
	}
}

// unbind keeps b while the kernel has its bootstrap open: that is while it is mounted.
func (t *cachefilesTransport) unbind(b *binding) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	keys := b.keys()
	if t.open[keys[0]] > 0 {
		return false
	}
	for _, k := range keys {
		t.bound[k] = slices.DeleteFunc(t.bound[k], func(o *binding) bool { return o == b })
		if len(t.bound[k]) == 0 {
			delete(t.bound, k)
		}
	}
	return true
}

// remove forgets img's bootstrap, unless the image was opened anew meanwhile.
func (t *cachefilesTransport) remove(img *image) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := img.key.object(img.key.id)
	if b, ok := t.objects[k].(*bootFile); ok && b.f == img.boot {
		delete(t.objects, k)
	}
}

// idle forgets v, whichever images it had.
func (t *cachefilesTransport) idle(v *device) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.objects, func(_ cachefiles.Key, o served) bool { return o == v })
	return nil
}

func (t *cachefilesTransport) found(context.Context, *image) error { return nil }

func (t *cachefilesTransport) mount(ctx context.Context, img *image, s MountSpec) error {
	s.Bootstrap, s.FSID, s.Domain = img.boot, img.key.id, img.key.kernelDomain()
	for _, v := range img.devices {
		s.Cookies = append(s.Cookies, v.blob.ID())
	}
	err := t.d.mounter.Mount(ctx, s)
	if errors.Is(err, syscall.EEXIST) {
		return api.Conflict(fmt.Errorf("it is unmounted here but still used elsewhere (by a container, or from another mount namespace); end that first: %w", err))
	}
	return err
}

// discard culls the object of k's bootstrap, and with the last image of a domain all
// that the kernel made for it. What is gone already is no error.
func (t *cachefilesTransport) discard(k imageKey, last bool) error {
	if err := t.discardBlob(k, k.id); err != nil || !last {
		return err
	}
	err := t.device.CullVolume(cachefiles.VolumeKey(k.kernelDomain(), k.id))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, cachefiles.ErrInUse) { // somebody mounts an image of it
		return nil
	}
	return err
}

func (t *cachefilesTransport) discardBlob(k imageKey, id string) error {
	if err := t.device.Cull(k.object(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// discardEverywhere looks into each volume of the kernel's cache.
func (t *cachefilesTransport) discardEverywhere(id string) error {
	entries, err := os.ReadDir(filepath.Join(t.device.Dir(), "cache"))
	if err != nil {
		return fmt.Errorf("look into the kernel's cache: %w", err)
	}
	var errs []error
	for _, e := range entries {
		volume, ok := strings.CutPrefix(e.Name(), "I") // cachefiles.VolumePath
		k := cachefiles.Key{Volume: volume, Cookie: id}
		if !ok || k.Validate() != nil {
			continue
		}
		if _, err := os.Lstat(filepath.Join(t.device.Dir(), k.Path())); err != nil {
			continue
		}
		if err := t.device.Cull(k); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// live reports whether the kernel has the object id of k open.
func (t *cachefilesTransport) live(k imageKey, id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.open[k.object(id)] > 0
}

// usage looks at the kernel's file. A new one has no name until it is closed for the
// first time; then the blob knows how much is in it. What is left of a fanotify daemon
// counts too.
func (t *cachefilesTransport) usage(k imageKey, id string) (n int64) {
	if id != "" {
		n = t.d.blobs.Usage(k.domain, id)
	}
	key := k.object(cmp.Or(id, k.id))
	if blocks, err := diskOf(filepath.Join(t.device.Dir(), key.Path())); err == nil {
		return n + blocks
	}
	if v, ok := t.behind(key).(*device); ok {
		n += v.blob.Stats().Present
	}
	return n
}

// busy says whether the kernel has img's bootstrap open: it lets go of that with the
// last mount.
func (t *cachefilesTransport) busy(img *image) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.open[img.key.object(img.key.id)] > 0
}

// adopt goes on with the mounts of an earlier daemon, whose device somebody kept
// open. Without it they are dead: nothing can be read from them any more, so they
// are detached.
func (t *cachefilesTransport) adopt(ctx context.Context) error {
	defer close(t.d.adopted)
	mounts, err := t.d.ownMounts()
	if err != nil {
		return err
	}
	for _, own := range mounts {
		if !t.inherited {
			t.d.log.Error("detaching an image of an earlier daemon: the kernel closed its cache with that daemon, and fails its reads; "+
				"restart those who use it and mount it again", "image", own.key.id, "mountpoint", own.Point)
			if err := t.d.mounter.Unmount(ctx, own.Point, true); err != nil {
				t.d.log.Error("detach", "mountpoint", own.Point, "err", err)
			}
			continue
		}
		failpoint.Hit("daemon.cachefiles.takeover.adopt")
		img, src, err := t.d.reacquire(ctx, own.key)
		if err != nil {
			t.d.log.Error("cannot go on with an image of an earlier daemon; what it lacks reads as EIO", "image", own.key.id, "mountpoint", own.Point, "err", err)
			continue
		}
		t.d.keep(&mount{point: own.Point, source: src.label, img: img})
		t.d.log.Info("goes on with an image", "image", own.key.id, "mountpoint", own.Point)
	}
	if !t.inherited {
		return nil
	}
	failpoint.Hit("daemon.cachefiles.takeover.adopted")
	if err := t.device.Restore(); err != nil {
		return err
	}
	failpoint.Hit("daemon.cachefiles.takeover.restored")
	return nil
}
