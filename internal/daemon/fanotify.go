package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// A fanotifyTransport marks the cache files and mounts with them as devices.
type fanotifyTransport struct {
	d       *Daemon
	group   *fanotify.Group // the kernel's fd
	guard   *guard          // nil when the kernel is a fake
	taken   *takenFiles     // of a predecessor, nil if there was none
	journal *os.File        // of the group, nil without a keeper
}

// A mark is what is known of a cache file's mark. It must be there before EROFS
// opens the file (a file opened earlier never raises events), also for a complete
// blob: it can then come back later, when another image asks for chunks that the
// blob does not have yet.
type mark struct {
	pins int // mounts and evictions under way that need it
	on   bool
}

func startFanotify(d *Daemon) (transport, error) {
	t := &fanotifyTransport{d: d, group: d.o.Kernel.Group}
	if t.group != nil {
		return t, nil
	}
	if err := d.passGate(d.ctx); err != nil {
		return nil, err
	}
	if err := t.openGroup(); err != nil {
		return nil, fmt.Errorf("open fanotify group: %w", err)
	}
	if err := t.openGuard(); err != nil {
		return nil, errors.Join(err, t.group.Close())
	}
	return t, nil
}

// openGroup takes the group over from a predecessor, or makes one.
func (t *fanotifyTransport) openGroup() (err error) {
	h := t.d.o.Holder
	o := fanotify.Options{Logger: t.d.log, Deadline: t.d.o.FillTimeout, Observer: t.d.measured.fanotify}
	if err := h.journal(t.d.ctx, &o); err != nil {
		return err
	}
	t.journal = o.Journal
	if f := h.take(heldGroup).File; f != nil {
		t.group, err = fanotify.NewGroupFromFile(f, o)
		t.taken = newTakenFiles(t, h.takeAll(heldBlob))
		return err
	}
	if t.group, err = fanotify.NewGroup(o); err != nil {
		return err
	}
	if err := h.put(t.d.ctx, heldGroup, nil, t.group.File()); err != nil {
		return errors.Join(err, t.group.Close())
	}
	return nil
}

// openGuard finds the guard of a predecessor, if it lives, or starts one.
func (t *fanotifyTransport) openGuard() (err error) {
	h := t.d.o.Holder
	pipe, process := h.take(heldGuard).File, h.take(heldGuardPID).File
	if pipe != nil && process != nil {
		t.guard = &guard{pipe: pipe, process: process}
		if t.guard.lives() {
			return nil
		}
		t.d.log.Warn("the guard has died; another is started")
		if err := t.guard.release(); err != nil {
			return err
		}
	}
	t.guard, err = startGuard(t.group.File(), t.d.lock, filepath.Join(t.d.o.Root, "cache"), h.belowSystemd(), t.d.log)
	if err != nil {
		return err
	}
	// In this order: a pipe without its process is not used again, and closing it ends
	// nothing while the keeper holds it.
	if err = h.put(t.d.ctx, heldGuardPID, nil, t.guard.process); err == nil {
		err = h.put(t.d.ctx, heldGuard, nil, t.guard.pipe)
	}
	if err != nil {
		return errors.Join(err, t.guard.dismiss())
	}
	return nil
}

func (t *fanotifyTransport) name() string { return Fanotify }

func (t *fanotifyTransport) serve(ctx context.Context) error { return t.group.Serve(ctx) }

// fd is nil: a group without its marks' files is of no use to a later daemon.
func (t *fanotifyTransport) fd() *os.File { return nil }

func (t *fanotifyTransport) stats() api.Kernel {
	s := t.group.Stats()
	return api.Kernel{Events: s.Events, Denied: s.Denied, InFlight: s.InFlight, Malformed: s.Malformed}
}

// close closes the group. Unless the end is orderly the guard stays and answers EIO
// for what is still in use.
func (t *fanotifyTransport) close(orderly bool) error {
	var err error
	switch {
	case t.guard == nil:
	case orderly:
		err = t.guard.dismiss()
	default:
		err = t.guard.release()
	}
	err = errors.Join(err, t.taken.close(), t.group.Close())
	if t.journal != nil {
		err = errors.Join(err, t.journal.Close())
	}
	return err
}

func (t *fanotifyTransport) leave(context.CancelFunc) { t.group.Leave() }

func (t *fanotifyTransport) add(context.Context, *image) error { return nil }

func (t *fanotifyTransport) remove(*image) {}

// A name means nothing to this kernel: a bound image is like any other that is mounted.
func (t *fanotifyTransport) bind(*binding) {}

func (t *fanotifyTransport) unbind(*binding) bool { return true }

// discard removes what cachefiles has kept of k: its bootstrap, which nobody needs any
// more, and with last its domain's directories.
func (t *fanotifyTransport) discard(k imageKey, last bool) error {
	if err := t.discardBlob(k, k.id); err != nil || !last {
		return err
	}
	return t.d.removeLeftVolume(k)
}

// discardBlob removes the sibling of what blobmgr has: this kernel has nothing of its own.
func (t *fanotifyTransport) discardBlob(k imageKey, id string) error { return t.d.removeLeft(k, id) }

func (t *fanotifyTransport) discardEverywhere(string) error { return nil }

// live reports whether an image that has the blob or bootstrap is open.
func (t *fanotifyTransport) live(k imageKey, id string) bool {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	for _, img := range t.d.images {
		if img.key.domain == k.domain && img.isOpen() && (img.key.id == id || img.has(id)) {
			return true
		}
	}
	return false
}

func (t *fanotifyTransport) usage(k imageKey, id string) int64 {
	n := t.d.leftUsage(k, cmp.Or(id, k.id))
	if id != "" {
		n += t.d.blobs.Usage(k.domain, id)
	}
	return n
}

// found marks img's files, as long as they are incomplete.
func (t *fanotifyTransport) found(ctx context.Context, img *image) error {
	if err := t.pin(ctx, img.devices); err != nil {
		return fmt.Errorf("mark the files of image %s: %w", img.key, err)
	}
	t.unpin(img.devices)
	return nil
}

func (t *fanotifyTransport) mount(ctx context.Context, img *image, s MountSpec) error {
	s.Bootstrap = img.boot
	for _, v := range img.devices {
		s.Devices = append(s.Devices, v.blob.File())
	}
	if err := t.pin(ctx, img.devices); err != nil {
		return fmt.Errorf("mark cache files: %w", err)
	}
	defer t.unpin(img.devices)
	return t.d.mounter.Mount(ctx, s)
}

// busy says whether a file of img is incomplete and still open in the kernel, with
// no other image that would keep it marked. A lease is asked for without waiting.
func (t *fanotifyTransport) busy(img *image) bool {
	for _, v := range img.devices {
		if v.images > 1 || v.blob.Stats().Complete {
			continue
		}
		used, err := inUse(v.blob.File())
		if err != nil {
			t.d.log.Warn("ask whether a cache file is in use", "blob", v.id, "err", err)
		}
		if used {
			return true
		}
	}
	return false
}

// pin sets the marks of vs and keeps them until unpin. The keeper has the files before
// they are marked: opened later they would raise events for their own daemon.
func (t *fanotifyTransport) pin(ctx context.Context, vs []*device) error {
	for _, v := range vs {
		if err := t.d.o.Holder.putBlob(ctx, v.blob); err != nil {
			return err
		}
	}
	failpoint.Hit("daemon.fanotify.held")
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	for i, v := range vs {
		v.mark.pins++
		if v.mark.on {
			continue
		}
		failpoint.Hit("daemon.fanotify.mark")
		if err := t.group.Watch(v.blob.File(), v); err != nil {
			for _, v := range vs[:i+1] {
				v.mark.pins--
			}
			return err
		}
		v.mark.on = true
		failpoint.Hit("daemon.fanotify.marked")
	}
	return nil
}

func (t *fanotifyTransport) unpin(vs []*device) {
	t.d.mu.Lock()
	for _, v := range vs {
		v.mark.pins--
	}
	t.d.mu.Unlock()
	for _, v := range vs {
		t.completed(v)
	}
}

// completed removes the mark of a complete blob: from then on its reads cost what
// a local file costs.
func (t *fanotifyTransport) completed(v *device) {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	if v.mark.pins > 0 || v.images == 0 || !v.blob.Stats().Complete {
		return
	}
	if err := t.idle(v); err != nil {
		t.d.log.Warn("cannot remove the mark of a complete blob; it stays slower than it could be", "blob", v.id, "err", err)
	}
}

// idle removes v's mark. d.mu is held: it makes a mark and a completion that race
// agree; the call itself does not wait.
func (t *fanotifyTransport) idle(v *device) error {
	if !v.mark.on {
		return nil
	}
	v.mark.on = false
	failpoint.Hit("daemon.fanotify.unmark")
	defer failpoint.Hit("daemon.fanotify.unmarked")
	return t.group.Unwatch(v.blob.File())
}

// adopt takes over the mounts of a daemon that ended before this one. Complete
// images never noticed and stay. An incomplete one may have given zeros to its
// readers, who keep them in the page cache: it is detached, so that nobody new
// finds it, and those who are inside get EIO for what is missing.
func (t *fanotifyTransport) adopt(ctx context.Context) error {
	mounts, err := t.d.ownMounts()
	if err != nil {
		return err
	}
	if t.taken != nil {
		return t.taken.begin(mounts)
	}
	defer close(t.d.adopted)
	for _, m := range mounts {
		if t.adoptOne(ctx, m) {
			t.d.log.Info("took over a complete image", "image", m.key.id, "mountpoint", m.Point)
			continue
		}
		t.d.log.Error("detaching an incomplete image that an earlier daemon left: its readers may have got zeros; "+
			"restart those who use it and mount it again", "image", m.key.id, "mountpoint", m.Point)
		if err := t.d.mounter.Unmount(ctx, m.Point, true); err != nil {
			t.d.log.Error("detach", "mountpoint", m.Point, "err", err)
		}
	}
	return nil
}

// adoptOne adds a mount to the table if its image is complete. If it is not, its
// files are marked all the same and stay so while they are used.
func (t *fanotifyTransport) adoptOne(ctx context.Context, own ownMount) bool {
	img, src, err := t.d.reacquire(ctx, own.key)
	if err != nil {
		t.d.log.Warn("open the image of an earlier daemon", "image", own.key.id, "err", err)
		return false
	}
	if err := t.found(ctx, img); err != nil {
		t.d.log.Warn("an image of an earlier daemon", "image", own.key.id, "err", err)
	}
	m := &mount{point: own.Point, source: src.label, img: img}
	if !t.d.describe(m).Complete {
		t.d.release(img)
		return false
	}
	t.d.keep(m)
	return true
}
