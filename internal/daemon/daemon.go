package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
)

// Options configures a Daemon. Only Root is required.
type Options struct {
	Root         string        // directory of caches and metadata; made with mode 0700
	Logger       *slog.Logger  // nil: discard
	NoCompletion bool          // do not fetch the rest of an image after its first reads
	FillTimeout  time.Duration // a kernel request is denied after this long; default 60 s
}

// A Daemon serves images. New makes one that can mount at once; Run answers
// the kernel and the API until it is told to stop.
type Daemon struct {
	o       Options
	log     *slog.Logger
	blobs   *blobmgr.Manager
	group   *fanotify.Group // the kernel's fd: the only one, kept here so that a keeper can hold it
	lock    *os.File
	guard   *guard
	metrics *prometheus.Registry
	stores  *stores

	// mu guards the tables below and the fields of their entries that say so.
	mu      sync.Mutex
	images  map[string]*image // by id
	mounts  map[string]*mount // by mount point
	watches map[*blobmgr.Blob]*watch

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
	// Only what is ours alone is closed to others: root may be a directory of the user's.
	for _, dir := range []string{"images", "cache"} {
		if err := privateDir(filepath.Join(o.Root, dir)); err != nil {
			return nil, err
		}
	}
	if err := fanotify.Supported(filepath.Join(o.Root, "cache")); err != nil {
		return nil, fmt.Errorf("serve images from %s: %w (run erofsctl doctor)", o.Root, err)
	}
	lock, err := lockRoot(o.Root)
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		o: o, lock: lock, log: o.Logger, metrics: prometheus.NewRegistry(),
		images: map[string]*image{}, mounts: map[string]*mount{}, watches: map[*blobmgr.Blob]*watch{},
	}
	d.stores = newStores(d.log, d.metrics)
	if err := d.start(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return d, nil
}

// start opens the cache and the kernel's fd, and starts the guard.
func (d *Daemon) start() (err error) {
	cache := filepath.Join(d.o.Root, "cache")
	d.blobs, err = blobmgr.New(blobmgr.Options{
		Dir: cache, Logger: d.log, Registerer: d.metrics, NoCompletion: d.o.NoCompletion,
	})
	if err != nil {
		return fmt.Errorf("open cache: %w", err)
	}
	d.group, err = fanotify.NewGroup(fanotify.Options{Logger: d.log, Deadline: d.o.FillTimeout})
	if err != nil {
		return errors.Join(fmt.Errorf("open fanotify group: %w", err), d.blobs.Close())
	}
	d.guard, err = startGuard(d.group.File(), d.lock, cache)
	if err != nil {
		return errors.Join(err, d.group.Close(), d.blobs.Close())
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return nil
}

// privateDir makes dir, or checks that nobody but its owner can look into it.
func privateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("close directory to others: %w", err)
	}
	return nil
}

// Run serves the kernel and the API at the unix socket until ctx is done; it
// can be called once, and closes the daemon. At the end it unmounts what it can.
// While an incomplete image is still in use it goes on serving it, because the
// kernel would read zeros from its holes, until force is done too: then the
// guard answers EIO in its place.
func (d *Daemon) Run(ctx, force context.Context, socket string) (err error) {
	orderly := false
	defer func() { err = errors.Join(err, d.close(orderly)) }()
	l, err := listen(socket)
	if err != nil {
		return err
	}
	kernelDone := make(chan error, 1)
	kctx, stopKernel := context.WithCancel(context.WithoutCancel(ctx))
	ctx, lost := context.WithCancel(ctx)
	defer lost()
	go func() {
		kernelDone <- d.group.Serve(kctx)
		lost() // nobody answers the kernel any more: end, so that the guard does
	}()
	defer func() {
		stopKernel()
		err = errors.Join(err, <-kernelDone)
	}()
	if err := d.adopt(ctx); err != nil {
		return errors.Join(fmt.Errorf("look for mounts of an earlier daemon: %w", err), l.Close())
	}
	d.log.Info("serving", "root", d.o.Root, "socket", socket, "transport", transport)
	if err := d.serveAPI(ctx, l); err != nil {
		return fmt.Errorf("serve API at %s: %w", socket, err)
	}
	if len(kernelDone) == 0 {
		orderly = d.shutdown(ctx, force)
	}
	return nil
}

// serveAPI answers the API until ctx is done. The listener's socket is removed with it.
func (d *Daemon) serveAPI(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("/", api.Handler(d))
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelWarn)}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_ = srv.Shutdown(sctx) // past the limit requests are cut off; they can be repeated
	})
	err := srv.Serve(l)
	if stop() {
		return err // it ended by itself
	}
	<-ended
	return nil
}

// close ends what start started. Unless the end is orderly the guard stays and
// answers EIO for what is still in use.
func (d *Daemon) close(orderly bool) error {
	d.cancel()
	d.background.Wait()
	errs := []error{d.blobs.Close(), d.stores.close()}
	if orderly {
		errs = append(errs, d.guard.dismiss())
	}
	return errors.Join(append(errs, d.group.Close(), d.lock.Close())...)
}

// listen opens the API's socket, for root only. A socket that nobody answers at is
// left over from a dead daemon and is replaced.
func listen(socket string) (net.Listener, error) {
	dir := filepath.Dir(socket)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := privateDir(dir); err != nil {
			return nil, err
		}
	}
	if c, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen at %s: another daemon answers there; stop it or choose another --socket", socket)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen at %s: remove stale socket: %w", socket, err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", socket, err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen at %s: %w", socket, err), l.Close())
	}
	return l, nil
}
