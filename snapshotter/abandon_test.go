package snapshotter

import (
	"path/filepath"
	"syscall"
	"testing"
)

// TestAbandon unmounts what keeps another daemon from starting: also images that were removed
// when no daemon was there to unmount them, in their place and in the trash.
func TestAbandon(t *testing.T) {
	for name, restarted := range map[string]bool{"in place": false, "in the trash": true} {
		t.Run(name, func(t *testing.T) {
			r := newLazy(t)
			kept := pull(t.Context(), t, r, "1", bootstrapOf(t, "kept"))
			removed := pull(t.Context(), t, r, "2", bootstrapOf(t, "removed"))
			prepare(t, r.Snapshotter, "a", kept)
			prepare(t, r.Snapshotter, "b", removed)
			r.daemon.setDown(syscall.ECONNREFUSED)
			for _, key := range []string{"b", removed} {
				if err := r.Remove(t.Context(), key); err != nil {
					t.Fatal(err)
				}
			}
			if restarted {
				r.restart(t)
			}
			if err := r.Cleanup(t.Context()); err == nil {
				t.Error("an image was cleaned up without its daemon")
			}
			dirs, err := r.directories()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				for _, dir := range dirs {
					_ = syscall.Unmount(filepath.Join(dir, "mnt"), syscall.MNT_DETACH) // it should not be mounted
				}
			})
			mounted := func() (n int) {
				for _, dir := range dirs {
					if isImage(filepath.Join(dir, "mnt")) {
						n++
					}
				}
				return n
			}
			if n := mounted(); n != 2 {
				t.Errorf("%d images are mounted, want 2", n)
			}
			if err := r.Abandon(); err != nil {
				t.Error(err)
			}
			if n := mounted(); n != 0 {
				t.Errorf("%d images are still mounted", n)
			}
			r.daemon.mu.Lock() // its mounts are no more
			clear(r.daemon.mounts)
			r.daemon.mu.Unlock()
		})
	}
}
