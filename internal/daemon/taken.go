package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/internal/keeper"
)

// adoptTime is how long an image may take to open before the next one has its turn. Its
// readers' events try again.
const adoptTime = 10 * time.Second

// takenFiles are the marked cache files of a predecessor that was killed. Readers wait
// for their events, and may ask for more at any moment; so the group is served at once,
// and an image is opened when its first event comes, or when its turn comes.
type takenFiles struct {
	t *fanotifyTransport

	mu    sync.Mutex          // guards what follows
	files map[string]*os.File // not yet with their blob, by name
	jobs  []*adoption
	names map[string][]*adoption // those that have a blob, by its name
}

// An adoption opens an image that a predecessor had open.
type adoption struct {
	key    imageKey
	points []string // where it is mounted; none: it is in use all the same
	turn   turn
	done   bool // guarded by turn
}

func newTakenFiles(t *fanotifyTransport, blobs map[string]keeper.Entry) *takenFiles {
	f := &takenFiles{t: t, files: map[string]*os.File{}, names: map[string][]*adoption{}}
	for name, e := range blobs {
		f.files[name] = e.File
	}
	return f
}

// file returns the cache file called name, once; nil if there is none.
func (f *takenFiles) file(name string) *os.File {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	file := f.files[name]
	delete(f.files, name)
	return file
}

// begin makes the files known to the group and begins to open the images.
func (f *takenFiles) begin(mounts []ownMount) error {
	for name, file := range f.files { // nobody else is here yet
		if err := f.t.group.Expect(file, &takenFile{f, name}); err != nil {
			return err
		}
	}
	f.plan(mounts)
	d := f.t.d
	d.background.Go(func() {
		defer close(d.adopted)
		for _, a := range f.jobs {
			ctx, cancel := context.WithTimeout(d.ctx, adoptTime)
			if err := f.adopt(ctx, a); err != nil && d.ctx.Err() == nil {
				d.log.Error("cannot go on with an image; what it lacks reads as EIO until it can", "image", a.key.id, "err", err)
			}
			cancel()
		}
		d.log.Info("took over the images of a daemon that died", "images", len(f.jobs))
	})
	return nil
}

// plan lists the images: those that are mounted, and those that are in use without.
func (f *takenFiles) plan(mounts []ownMount) {
	d := f.t.d
	jobs := map[imageKey]*adoption{}
	add := func(k imageKey) *adoption {
		if jobs[k] == nil {
			jobs[k] = &adoption{key: k, turn: make(turn, 1)}
			f.jobs = append(f.jobs, jobs[k])
		}
		return jobs[k]
	}
	for _, m := range mounts {
		a := add(m.key)
		a.points = append(a.points, m.Point)
	}
	for _, k := range d.before {
		add(k)
	}
	for _, a := range f.jobs {
		r, err := d.readRecord(a.key)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Warn("the record of an image is damaged", "image", a.key.id, "err", err)
		}
		for _, id := range r.Blobs {
			name := imageKey{a.key.domain, id}.String() // as blobmgr calls it
			f.names[name] = append(f.names[name], a)
		}
	}
}

// adopt opens a's image, if that was not done yet.
func (f *takenFiles) adopt(ctx context.Context, a *adoption) error {
	if err := a.turn.take(ctx); err != nil {
		return err
	}
	defer a.turn.give()
	if a.done {
		return nil
	}
	d := f.t.d
	failpoint.Hit("daemon.fanotify.takeover.adopt")
	img, src, err := d.reacquire(ctx, a.key)
	if err != nil {
		return err
	}
	if err := f.t.found(ctx, img); err != nil {
		d.release(img)
		return err
	}
	for _, point := range a.points {
		d.mu.Lock()
		img.refs++
		d.mu.Unlock()
		d.keep(&mount{point: point, source: src.label, img: img})
	}
	d.release(img) // what reacquire got; without a mount it is served while it is in use
	a.done = true
	failpoint.Hit("daemon.fanotify.takeover.adopted")
	return nil
}

// close closes the files of blobs that no image wanted.
func (f *takenFiles) close() error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, file := range f.files {
		errs = append(errs, file.Close())
	}
	clear(f.files)
	return errors.Join(errs...)
}

// A takenFile stands for a cache file until its blob is open: its events wait for that.
type takenFile struct {
	f    *takenFiles
	name string
}

var _ fanotify.Object = (*takenFile)(nil)

// Ready is false: nothing is known yet.
func (x *takenFile) Ready(int64, int64) bool { return false }

// Fill opens an image that has the file and fills the range.
func (x *takenFile) Fill(ctx context.Context, off, n int64) error {
	d := x.f.t.d
	var errs []error
	idle := false
	for _, a := range x.f.names[x.name] {
		if err := x.f.adopt(ctx, a); err != nil {
			errs = append(errs, err)
			continue
		}
		idle = true // if it is closed again: it was opened, and the kernel had no use for it
		if v := d.deviceCalled(x.name); v != nil {
			if v.Ready(off, n) {
				return nil
			}
			return v.Fill(ctx, off, n)
		}
	}
	if idle && len(errs) == 0 {
		return fmt.Errorf("cache file %s: %w", x.name, fanotify.ErrNotOpen)
	}
	return errors.Join(append(errs, fmt.Errorf("no image that is known has the cache file %s", x.name))...)
}

// deviceCalled returns the device whose cache file is called name, nil if there is none.
func (d *Daemon) deviceCalled(name string) *device {
	d.mu.Lock()
	defer d.mu.Unlock()
	for b, v := range d.devices {
		if cacheName(b) == name {
			return v
		}
	}
	return nil
}
