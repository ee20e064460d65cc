package power

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// A worker does with a daemon what there is to do, one thing after the other, while
// readers read. Before each it leaves a label on the disk.
type worker struct {
	t       *testing.T
	rnd     *rand.Rand
	disk    *mounted
	options daemon.Options
	daemon  *process
	images  []*image
}

// rounds is how many there are at least. A cache file of cachefiles' has no name before its
// first unmount, and does not outlive a power cut: the second round is the first with any.
const rounds = 2

// work works on the disk for a while.
func work(t *testing.T, disk *mounted, k kernel, rnd *rand.Rand, while time.Duration) {
	t.Helper()
	w := &worker{
		t: t, rnd: rnd, disk: disk, images: images(t, k.images),
		options: daemon.Options{Root: disk.root(), Transport: k.transport},
	}
	defer w.others()()
	disk.label(t, "start")
	w.daemon = startDaemon(t, w.options)
	for i, start := 0, time.Now(); i < rounds || time.Since(start) < while; i++ {
		w.round()
	}
	w.label("stop")
	w.daemon.stop(t)
}

// others sync the disk at random moments, until stop is called.
func (w *worker) others() (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var syncs errgroup.Group
	pauses := rand.New(rand.NewPCG(w.rnd.Uint64(), 0))
	syncs.Go(func() error {
		return w.disk.syncOften(ctx, func() time.Duration { return time.Duration(pauses.IntN(1000)) * time.Millisecond })
	})
	return func() {
		cancel()
		if err := syncs.Wait(); err != nil {
			w.t.Error(err)
		}
	}
}

func (w *worker) label(text string) {
	w.t.Helper()
	w.disk.label(w.t, text)
}

// round fills, completes, pins, evicts, removes, and has the daemon start anew, the last
// two not always.
func (w *worker) round() {
	w.t.Helper()
	last := len(w.images) - 1
	byBootstrap, bound := w.images[:last], w.images[last]
	w.label("fill")
	for _, i := range byBootstrap {
		i.mount(w.t, w.daemon)
	}
	w.read(byBootstrap...)
	w.label("bind")
	bound.mount(w.t, w.daemon)
	w.read(bound)
	w.label("complete")
	w.readAll(byBootstrap[0]) // completion begins with the first miss
	await(w.t, "an image to be complete", func() bool { return byBootstrap[0].state(w.t, w.daemon).Complete })
	w.label("pin")
	w.pin(w.images[w.rnd.IntN(len(w.images))], w.rnd.IntN(2) == 0)
	w.label("unmount")
	w.rnd.Shuffle(last, func(a, b int) { byBootstrap[a], byBootstrap[b] = byBootstrap[b], byBootstrap[a] })
	for _, i := range w.images[1:] {
		i.unmount(w.t, w.daemon)
	}
	w.label("evict") // beside a mounted one
	w.evict()
	if w.rnd.IntN(2) == 0 {
		w.label("remove")
		w.forget(bound)
	}
	byBootstrap[0].unmount(w.t, w.daemon)
	if w.rnd.IntN(2) == 0 {
		w.label("restart")
		w.daemon.stop(w.t)
		w.daemon = startDaemon(w.t, w.options)
	}
}

// read reads some of the files of each image, all images at a time.
func (w *worker) read(list ...*image) {
	w.t.Helper()
	var readers errgroup.Group
	for _, i := range list {
		files := slices.Clone(i.files)
		w.rnd.Shuffle(len(files), func(a, b int) { files[a], files[b] = files[b], files[a] })
		files = files[:w.rnd.IntN(len(files)/2)]
		readers.Go(func() error { return i.read(files) })
	}
	if err := readers.Wait(); err != nil {
		w.t.Error(err)
	}
}

func (w *worker) readAll(i *image) {
	w.t.Helper()
	if err := i.read(i.files); err != nil {
		w.t.Error(err)
	}
}

// pin pins an image, or takes that back.
func (w *worker) pin(i *image, pinned bool) {
	w.t.Helper()
	if err := w.daemon.Pin(w.t.Context(), api.PinRequest{Image: i.id, Pinned: pinned}); err != nil {
		w.t.Errorf("pin %s: %v", i.name, err)
	}
}

// evict makes some room, up to all that there is.
func (w *worker) evict() {
	w.t.Helper()
	c, err := w.daemon.Cache(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	target := int64(w.rnd.Float64() * float64(c.Bytes))
	// That what is in use or pinned takes more is no error here.
	if _, err := w.daemon.Evict(w.t.Context(), api.EvictRequest{Target: target}); err != nil && statusOf(err) != http.StatusConflict {
		w.t.Errorf("evict down to %d of %d bytes: %v", target, c.Bytes, err)
	}
}

// forget unbinds and removes the image, as soon as the kernel lets go of it.
func (w *worker) forget(i *image) {
	w.t.Helper()
	if err := w.daemon.UnbindImage(w.t.Context(), api.ImageRequest{Image: i.id}); err != nil {
		w.t.Errorf("unbind %s: %v", i.name, err)
	}
	await(w.t, i.name+" to be removed", func() bool {
		err := w.daemon.Remove(w.t.Context(), api.RemoveRequest{Image: i.id})
		if err != nil && statusOf(err) != http.StatusConflict && statusOf(err) != http.StatusNotFound {
			w.t.Fatalf("remove %s: %v", i.name, err)
		}
		return statusOf(err) != http.StatusConflict
	})
}

// statusOf is that of the daemon's refusal, 0 when err is none.
func statusOf(err error) int {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}
