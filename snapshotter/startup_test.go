package snapshotter

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestStartUp starts over 200 images that a dead daemon had mounted, with another daemon that
// does not get on with the first of them: everything else answers, and an image that is asked
// for is mounted before all others, which follow when the daemon gets on.
func TestStartUp(t *testing.T) {
	const images, wanted = 200, 150
	r := newLazy(t)
	var tops []string
	for i := range images {
		tops = append(tops, pull(t.Context(), t, r, fmt.Sprint(i), bootstrapOf(t, fmt.Sprint("image ", i))))
		prepare(t, r.Snapshotter, fmt.Sprint("c-", i), tops[i])
	}
	image := digest.FromBytes(bootstrapOf(t, fmt.Sprint("image ", wanted))).Encoded()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.daemon.mu.Lock()
	clear(r.daemon.mounts)
	clear(r.daemon.bound)
	r.daemon.urgent = image
	r.daemon.mu.Unlock()
	before := r.daemon.count("mount")
	r.daemon.hang()
	r.open(t)
	await(t, "recovery waits for the first image", func() bool { return r.daemon.waiting.Load() == 1 })

	for i := range images {
		if _, err := r.Stat(t.Context(), tops[i]); err != nil {
			t.Error(err)
		}
	}
	prepare(t, r.Snapshotter, "ordinary", "")
	m, err := r.Mounts(t.Context(), fmt.Sprint("c-", wanted))
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != fmt.Sprint("image ", wanted) {
		t.Errorf("the image that was asked for has %q", text)
	}
	if n := r.daemon.count("mount") - before; n != 1 {
		t.Errorf("%d images were mounted, want the one that was asked for (%s)", n, filepath.Base(image))
	}
	r.daemon.wake()
	await(t, "the others follow", func() bool { return r.daemon.count("mount")-before == images })
}
