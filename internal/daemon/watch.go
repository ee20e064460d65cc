package daemon

import (
	"context"
	"sync/atomic"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/fanotify"
)

// A watch is what the daemon knows of one blob's mark. The mark must be there
// before EROFS opens the cache file (a file opened earlier never raises
// events), also for a complete blob: it can then come back later, when another
// image asks for chunks that the blob does not have yet.
type watch struct {
	id     string // of the blob
	blob   *blobmgr.Blob
	events atomic.Int64
	last   atomic.Pointer[string] // error of the last failed fill

	images int  // that hold the blob; guarded by Daemon.mu
	pins   int  // mounts under way that need the mark; guarded by Daemon.mu
	marked bool // guarded by Daemon.mu
}

var _ fanotify.Object = (*watch)(nil)

// Ready is asked once for each event, first.
func (w *watch) Ready(off, n int64) bool {
	w.events.Add(1)
	return w.blob.Ready(off, n)
}

// Fill makes a range present.
func (w *watch) Fill(ctx context.Context, off, n int64) error {
	err := w.blob.Fill(ctx, off, n)
	if err != nil {
		s := err.Error()
		w.last.Store(&s)
		return err
	}
	w.last.Store(nil)
	return nil
}

// hold adds b to the watched blobs.
func (d *Daemon) hold(id string, b *blobmgr.Blob) *watch {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := d.watches[b]
	if w == nil {
		w = &watch{id: id, blob: b}
		d.watches[b] = w
	}
	w.images++
	return w
}

// drop is the opposite of hold: with the last image the mark goes. The caller
// has made sure that the kernel has closed the file, or that it is complete.
func (d *Daemon) drop(w *watch) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	w.images--
	if w.images > 0 {
		return nil
	}
	delete(d.watches, w.blob)
	return d.unmark(w)
}

// pin sets the marks of ws and keeps them until unpin.
func (d *Daemon) pin(ws []*watch) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, w := range ws {
		w.pins++
		if w.marked {
			continue
		}
		if err := d.group.Watch(w.blob.File(), w); err != nil {
			for _, w := range ws[:i+1] {
				w.pins--
			}
			return err
		}
		w.marked = true
	}
	return nil
}

func (d *Daemon) unpin(ws []*watch) {
	d.mu.Lock()
	for _, w := range ws {
		w.pins--
	}
	d.mu.Unlock()
	for _, w := range ws {
		d.settle(w)
	}
}

// settle removes the mark of a complete blob: from then on its reads cost what
// a local file costs.
func (d *Daemon) settle(w *watch) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.pins > 0 || w.images == 0 || !w.blob.Stats().Complete {
		return
	}
	if err := d.unmark(w); err != nil {
		d.log.Warn("cannot remove the mark of a complete blob; it stays slower than it could be", "err", err)
	}
}

// unmark removes w's mark. d.mu is held: it makes a mark and a completion that
// race agree; the call itself does not wait.
func (d *Daemon) unmark(w *watch) error {
	if !w.marked {
		return nil
	}
	w.marked = false
	return d.group.Unwatch(w.blob.File())
}
