package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/config"
)

// Options configures a Daemon. Only Root is required.
type Options struct {
	Root         string        // directory of metadata and, for fanotify, caches; made with mode 0700
	Logger       *slog.Logger  `json:"-"` // nil: discard
	NoCompletion bool          // do not fetch the rest of an image after its first reads
	FillTimeout  time.Duration // a kernel request fails after this long; default 60 s
	Transport    string        // Auto (default), Fanotify or Cachefiles

	// For cachefiles:
	Fscache     string   // the kernel's cache directory; default Root/fscache
	FscacheTag  string   // its tag; default erofsd. Mounts of a dead daemon need the same again
	FillThreads int      // reads that wait for data at a time; default 1024
	Device      *os.File `json:"-"` // /dev/cachefiles as an earlier daemon left it, bound to Fscache
	// Handover leaves images mounted at the end, for a later daemon that gets Device:
	// somebody else holds it meanwhile.
	Handover bool
	// Hasty ends the daemon at once when it is told to, as nydusd does: what is in use then
	// reads as EIO. With fanotify incomplete images are waited for all the same.
	Hasty bool

	// High is how many bytes the cache may take before images that are not mounted go,
	// the least recently used first, and then data of images that are (quota.go), until
	// it takes Low. 0: there is no limit. Low defaults to nine tenths of High.
	High, Low int64
	// Grace is how long data are in doubt at least before they go, and ten ticks of the clock
	// by which it is seen that no reader is on its way to them (quiescence.go); default 10 s,
	// which is right for every machine. Tests have less.
	Grace time.Duration

	// Default is how an image gets its data that does not say so itself; its backend is
	// for images that name none.
	Default config.Image `json:"-"`

	// Sandbox is SandboxAuto, SandboxStrict, or "" and SandboxOff for none. A [Control]
	// enters it, for its whole process, before it serves.
	Sandbox string
	// User is who the process becomes in the sandbox; "": it stays who it is.
	User string
	// MountBelow are directories at or below which images are mounted from the sandbox, and
	// nowhere else. None: anywhere.
	MountBelow []string
	// Writable are directories, besides Root, in which the process changes files from there.
	Writable []string
	// UnixSockets lets it connect to unix sockets from there, also to those that only the
	// API names.
	UnixSockets bool
	confinement *confinement

	Nydusd NydusdOptions // of its API and its supervisor

	Holder *Holder `json:"-"` // what outlives this process; nil: nothing does

	Kernel FakeKernel `json:"-"` // for tests
}

// A FakeKernel stands in for the real one: a device or a group, and who mounts.
type FakeKernel struct {
	Device    *cachefiles.Device // bound
	Inherited bool               // an earlier daemon had it
	Group     *fanotify.Group
	Mounter   Mounter
}

func (o Options) cacheDir() string { return cmp.Or(o.Fscache, filepath.Join(o.Root, "fscache")) }

// A Daemon serves images. New makes one that can mount at once; [Control] answers
// the kernel and the API for it until it is told to stop.
type Daemon struct {
	o        Options
	log      *slog.Logger
	blobs    *blobmgr.Manager
	kernel   transport
	mounter  Mounter
	lock     *os.File
	imageDir *os.Root // Root/images, where what the API and registries name cannot leave
	metrics  *prometheus.Registry
	measured *metrics
	stores   *stores

	// mu guards the tables below and the fields of their entries that say so.
	mu         sync.Mutex
	images     map[imageKey]*image
	mounts     map[string]*mount // by mount point
	devices    map[*blobmgr.Blob]*device
	bindings   map[imageKey]*binding
	remembered map[imageKey]config.Image // what a predecessor knew; written before begin only
	before     []imageKey                // images that it had open; the same
	culls      map[string]struct{}       // ids that are to be culled as soon as they can be
	placed     imageKey                  // of the binding that is about to be in the table; its files stay

	upgrading turn          // serialises upgrades
	yielded   chan struct{} // closed when a successor waits for our end
	placing   turn          // serialises bindings
	removing  turn          // serialises removals of kept images
	closed    chan struct{} // told, without waiting, when an image is closed

	adopted    chan struct{} // closed when the images of a predecessor are in the tables
	events     events
	serving    atomic.Bool   // the kernel is answered
	handover   atomic.Bool   // images are left for a later daemon: Options.Handover, or a supervisor has our state
	lost       chan struct{} // closed when it is not any more
	kernelErr  error         // why; read only after lost
	stopKernel context.CancelFunc

	background sync.WaitGroup  // goroutines that outlive a request
	ctx        context.Context // ends them: the daemon's own, not a request's
	cancel     context.CancelFunc
}

var _ api.Service = (*Daemon)(nil)

// New prepares root, probes the kernel and opens the cache.
func New(o Options) (*Daemon, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.FillTimeout == 0 {
		o.FillTimeout = time.Minute
	}
	if o.Grace == 0 {
		o.Grace = 10 * time.Second
	}
	if o.High > 0 && o.Low == 0 {
		o.Low = o.High / 10 * 9
	}
	if o.Transport == Cachefiles && o.Device == nil && o.Kernel.Device == nil {
		// Before anything else is made: a start that fails changes nothing.
		device, err := openDevice(o)
		if err != nil {
			return nil, err
		}
		o.Kernel.Device = device
	}
	d, err := newDaemon(o)
	if err != nil && o.Kernel.Device != nil {
		err = errors.Join(err, o.Kernel.Device.Close())
	}
	return d, err
}

func newDaemon(o Options) (*Daemon, error) {
	// Only what is ours alone is closed to others: root may be a directory of the user's.
	for _, dir := range []string{"images", "cache"} {
		if err := privateDir(filepath.Join(o.Root, dir)); err != nil {
			return nil, err
		}
	}
	lock, err := o.Holder.lockRoot(context.Background(), o.Root)
	if err != nil {
		return nil, err
	}
	err = o.confinement.reclaim(o)
	if err == nil {
		err = removeParts(filepath.Join(o.Root, "images"))
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	d := &Daemon{
		o: o, lock: lock, log: o.Logger, metrics: prometheus.NewRegistry(), mounter: o.Kernel.Mounter,
		images: map[imageKey]*image{}, mounts: map[string]*mount{}, devices: map[*blobmgr.Blob]*device{},
		bindings: map[imageKey]*binding{}, culls: map[string]struct{}{}, remembered: map[imageKey]config.Image{}, adopted: make(chan struct{}), upgrading: make(turn, 1), yielded: make(chan struct{}), placing: make(turn, 1), removing: make(turn, 1), closed: make(chan struct{}, 1), lost: make(chan struct{}),
	}
	d.handover.Store(o.Handover)
	if d.mounter == nil {
		d.mounter = o.confinement.mounter(filepath.Join(o.Root, "images"))
	}
	if d.imageDir, err = os.OpenRoot(filepath.Join(o.Root, "images")); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	d.stores = newStores(o, d.metrics)
	d.measured = newMetrics(d.metrics, d)
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.remember()
	if err := d.start(); err != nil {
		d.cancel()
		return nil, errors.Join(err, d.imageDir.Close(), lock.Close())
	}
	return d, nil
}

// start meets the kernel and opens the cache.
func (d *Daemon) start() (err error) {
	d.kernel, err = startTransport(d)
	if err != nil {
		return fmt.Errorf("serve images from %s: %w (run erofsctl doctor)", d.o.Root, err)
	}
	d.blobs, err = blobmgr.New(blobmgr.Options{
		Dir: filepath.Join(d.o.Root, "cache"), Logger: d.log, Registerer: d.metrics, NoCompletion: d.o.NoCompletion,
		Attached: d.kernel.name() == Cachefiles, Inherited: d.inherited, Sibling: d.sibling, Disown: d.disownBlob, RoomWait: min(20*time.Second, d.o.FillTimeout/3),
	})
	if err != nil {
		return errors.Join(fmt.Errorf("open cache: %w", err), d.kernel.close(true))
	}
	return nil
}

// inherited returns the cache file called name that a predecessor had open, nil if there is none.
func (d *Daemon) inherited(name string) *os.File {
	if t, ok := d.kernel.(*fanotifyTransport); ok {
		return t.taken.file(name)
	}
	return nil
}

// privateDir makes dir, or checks that nobody but its owner can look into it.
func privateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	st, err := os.Stat(dir)
	if err == nil && st.Mode().Perm() != 0o700 { // in the sandbox nothing can be changed
		err = os.Chmod(dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("close directory to others: %w", err)
	}
	return nil
}

// begin goes on with what an earlier daemon mounted and answers the kernel until end.
func (d *Daemon) begin(ctx context.Context) error {
	if err := d.kernel.adopt(ctx); err != nil {
		return fmt.Errorf("go on with mounts of an earlier daemon: %w", err)
	}
	kctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	d.stopKernel = stop
	d.serving.Store(true)
	go func() {
		defer close(d.lost)
		d.kernelErr = d.kernel.serve(kctx)
		d.serving.Store(false)
	}()
	if d.o.High > 0 {
		d.background.Go(d.watchQuota)
	}
	if err := notify(d.handedOver()); err != nil {
		d.log.Warn("the service manager does not know that the daemon serves, nor keeps its device", "err", err)
	}
	return nil
}

// end unmounts what it can and closes the daemon. While an incomplete image is still in
// use it goes on serving it, because the kernel would read zeros from its holes, until
// force is done too: then the guard answers EIO in its place.
func (d *Daemon) end(ctx, force context.Context) error {
	orderly := d.serving.Load() && d.shutdown(ctx, force)
	if d.stopKernel != nil {
		d.stopKernel()
		<-d.lost
	}
	return errors.Join(d.kernelErr, d.close(orderly))
}

// handedOver is what the service manager keeps for the next daemon, nil if nothing.
func (d *Daemon) handedOver() *os.File {
	if !d.handover.Load() {
		return nil
	}
	return d.kernel.fd()
}

// close ends what start started. An end is orderly when the kernel needs nobody any
// more. Images that are left are not closed as usual: that would take marks away.
func (d *Daemon) close(orderly bool) error {
	d.cancel()
	d.background.Wait()
	var errs []error
	d.mu.Lock()
	for _, img := range d.images {
		select {
		case <-img.ready:
			errs = append(errs, img.boot.Close())
		default: // a request that was cut off still opens it
		}
	}
	for _, b := range d.bindings {
		errs = append(errs, b.close())
	}
	d.mu.Unlock()
	return errors.Join(append(errs, d.blobs.Close(), d.stores.close(), d.kernel.close(orderly), d.imageDir.Close(), d.lock.Close())...)
}
