package daemon

import (
	"context"
	"errors"
	"io/fs"
	"sync/atomic"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/fanotify"
)

// A device is what the daemon knows of one open blob, which the images of a domain
// share: to the kernel it is a device of theirs.
type device struct {
	id     string // of the blob
	blob   *blobmgr.Blob
	events atomic.Int64
	ready  atomic.Int64            // of these, those that found everything present
	last   atomic.Pointer[failure] // of the last fill; nil: it was none
	failed func(text string)       // told of each

	images int  // that hold the blob; guarded by Daemon.mu
	mark   mark // of the fanotify transport; guarded by Daemon.mu
}

// A failure is of a fill.
type failure struct {
	text   string
	denied bool // the backend refuses the login
}

var (
	_ fanotify.Object      = (*device)(nil)
	_ blobmgr.AttachedFile = (*cachefiles.File)(nil)
)

// Ready is asked once for each event, first.
func (v *device) Ready(off, n int64) bool {
	v.events.Add(1)
	ready := v.blob.Ready(off, n)
	if ready {
		v.ready.Add(1)
	}
	return ready
}

// Fill makes a range present.
func (v *device) Fill(ctx context.Context, off, n int64) error {
	err := v.blob.Fill(ctx, off, n)
	if err != nil {
		f := failure{text: err.Error(), denied: errors.Is(err, fs.ErrPermission)}
		v.last.Store(&f)
		v.failed(f.text)
		return err
	}
	v.last.Store(nil)
	return nil
}

// hold adds b to the devices.
func (d *Daemon) hold(id string, b *blobmgr.Blob) *device {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.devices[b]
	if v == nil {
		v = &device{id: id, blob: b, failed: d.events.add}
		d.devices[b] = v
	}
	v.images++
	return v
}

// drop is the opposite of hold. The caller has made sure that the kernel has closed
// the blob's file, or that it is complete.
func (d *Daemon) drop(v *device) error {
	err := d.forget(v)
	d.dropBlob(v)
	return errors.Join(err, v.blob.Close())
}

// dropBlob has the keeper let go of v's file, unless somebody has it as a device.
func (d *Daemon) dropBlob(v *device) {
	if v.blob.File() == nil {
		return // the kernel's
	}
	d.o.Holder.drop(heldBlob+cacheName(v.blob), func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.devices[v.blob] != nil
	})
}

func (d *Daemon) forget(v *device) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	v.images--
	if v.images > 0 {
		return nil
	}
	delete(d.devices, v.blob)
	return d.kernel.idle(v)
}
