package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
)

// Names of the transports, in options and status. Auto picks the one that this
// kernel has, fanotify first.
const (
	Auto       = "auto"
	Fanotify   = "fanotify"
	Cachefiles = "cachefiles"
)

// A transport is what the daemon wants from either way to the kernel: fanotify.go
// and cachefiles.go. Methods marked (mu) are called with Daemon.mu held and do not wait.
type transport interface {
	name() string
	// serve answers the kernel until ctx is done. An error means that it cannot any more.
	serve(ctx context.Context) error
	// adopt goes on with what an earlier daemon mounted. It comes before serve.
	adopt(ctx context.Context) error
	// add makes the kernel's requests for img answerable. remove is its opposite, but for
	// the blobs, of which idle is told: img is about to be closed.
	add(ctx context.Context, img *image) error
	remove(img *image)
	// bind makes the kernel's requests for b's names answerable, and unbind is its
	// opposite, unless the kernel still needs b: then it returns false (mu).
	bind(b *binding)
	unbind(b *binding) bool
	// found is told of img that is mounted, though this worker did not mount it.
	found(ctx context.Context, img *image) error
	// mount mounts img, with its blobs ready to be asked for.
	mount(ctx context.Context, img *image, s MountSpec) error
	// busy says whether the kernel needs the daemon for img (mu).
	busy(img *image) bool
	// idle ends what is done for a blob without images (mu).
	idle(b *device) error
	// completed is told when everything of b that its images can read is present.
	completed(b *device)
	// discard removes what the kernel's cache has of an image that is not open, of its
	// own; with last its domain has no other image. discardBlob removes a blob of it.
	discard(k imageKey, last bool) error
	discardBlob(k imageKey, id string) error
	// discardEverywhere removes the object id from volumes that no record tells of.
	discardEverywhere(id string) error
	// usage is how many bytes of disk a blob of k takes, or with id "" k's own data.
	usage(k imageKey, id string) int64
	// live reports whether the kernel has the object id of k open.
	live(k imageKey, id string) bool
	// fd is the kernel's fd that a later daemon can go on with, nil if there is none.
	fd() *os.File
	stats() api.Kernel
	// leave ends serve, whose context stop ends, so that a successor can go on: what is under
	// way may come to its end, and nothing is denied.
	leave(stop context.CancelFunc)
	// close lets go of the kernel. Unless the end is orderly it is still in use.
	close(orderly bool) error
}

// startTransport meets the kernel in the way that o asks for. Auto takes cachefiles
// where the kernel or Root's file system cannot do fanotify.
func startTransport(d *Daemon) (transport, error) {
	if d.o.Holder.inherits(heldGroup) {
		return startFanotify(d)
	}
	if d.o.Handover && os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, errors.New("--handover needs a service manager that keeps the device (NOTIFY_SOCKET is not set)")
	}
	switch o := d.o; {
	case o.Kernel.Device != nil, o.Device != nil, o.Transport == Cachefiles:
		return startCachefiles(d)
	case o.Kernel.Group != nil:
		return startFanotify(d)
	case o.Transport != Auto && o.Transport != "" && o.Transport != Fanotify:
		return nil, fmt.Errorf("unknown transport %q: want %s, %s or %s", o.Transport, Auto, Fanotify, Cachefiles)
	}
	ferr := fanotify.Supported(filepath.Join(d.o.Root, "cache"))
	if ferr == nil {
		return startFanotify(d)
	}
	ferr = fmt.Errorf("%s: %w", Fanotify, ferr)
	if d.o.Transport == Fanotify {
		return nil, ferr
	}
	t, err := startCachefiles(d)
	if err != nil {
		return nil, errors.Join(ferr, fmt.Errorf("%s: %w", Cachefiles, err))
	}
	return t, nil
}
