package daemon

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// damageKept changes random bytes of small files that a root keeps, or cuts them off, and
// returns what it did.
func damageKept(t *testing.T, root string, r *rand.Rand) (did []string) {
	t.Helper()
	var names []string
	for _, pattern := range []string{"images/*", "cache/*.meta", "cache/*.clean", "cache/,running"} {
		some, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, some...)
	}
	slices.Sort(names)
	for range 1 + r.IntN(len(names)) {
		name := names[r.IntN(len(names))]
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		what := "changed"
		if r.IntN(4) == 0 {
			what, p = "cut off", p[:r.IntN(len(p)+1)]
		}
		for range r.IntN(4) {
			if len(p) > 0 {
				p[r.IntN(len(p))] ^= 1 << r.IntN(8)
			}
		}
		did = append(did, fmt.Sprint(filepath.Base(name), " ", what))
		if err := os.WriteFile(name, p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return did
}

// unguarded waits until nobody has the root of a daemon that was killed.
func (d *testDaemon) unguarded(t *testing.T) {
	t.Helper()
	await(t, "the guard to end", func() bool {
		lock, err := lockRoot(d.root)
		return err == nil && lock.Close() == nil
	})
}

// TestDamagedFiles: whatever happens between two runs to what the daemon keeps beside the
// data, the next one starts, says what it has, and has the right bytes or refuses. $SEED
// repeats a run.
func TestDamagedFiles(t *testing.T) {
	seed, err := strconv.ParseUint(cmp.Or(os.Getenv("SEED"), fmt.Sprint(time.Now().UnixNano())), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	tree, root := fixtureList(t), newRoot(t)
	requests := []api.MountRequest{localRequest(t, "zstd"), localRequest(t, "lz4"), localRequest(t, "batch")}
	var did []string
	for range 10 {
		d := startDaemon(t, daemonOptions{root: root, completion: true})
		if err := fanotify.Supported(root); err != nil {
			testenv.Kernel(t, "fanotify", err)
		}
		if _, err := d.Status(t.Context()); err != nil {
			t.Fatalf("status after %s: %v", did, err)
		}
		q := requests[r.IntN(len(requests))]
		if q.Mountpoint = newMountpoint(t); r.IntN(4) == 0 {
			// Of this image nothing is kept that can be read; then it is as good as removed.
			_ = d.Remove(t.Context(), api.RemoveRequest{Image: q.Bootstrap})
		}
		if _, err := d.Mount(t.Context(), q); err != nil {
			t.Fatalf("mount after %s: %v\n%s", did, err, d.log)
		}
		compareTree(t, tree, q.Mountpoint)
		if _, err := d.Evict(t.Context(), api.EvictRequest{Target: r.Int64N(8 << 20)}); err != nil {
			t.Errorf("evict after %s: %v", did, err)
		}
		if t.Failed() {
			t.Fatalf("after %s", did)
		}
		killed := r.IntN(3) == 0
		if killed {
			await(t, "the image to be complete", func() bool { return d.image(t, q.Mountpoint).Complete })
			d.umount(t, q.Mountpoint)
			d.kill()
			d.unguarded(t)
		} else {
			d.stop(t)
		}
		did = damageKept(t, root, r)
	}
}

// TestAdoptDamaged: a daemon that finds mounts of a predecessor whose files are damaged
// does not go on with them as if they were whole.
func TestAdoptDamaged(t *testing.T) {
	for _, suffix := range []string{bootSuffix, recordSuffix} {
		t.Run(suffix, func(t *testing.T) {
			d := startDaemon(t, daemonOptions{completion: true})
			if err := fanotify.Supported(d.root); err != nil {
				testenv.Kernel(t, "fanotify", err)
			}
			q := localRequest(t, "zstd")
			m := d.mount(t, q)
			compareTree(t, fixtureList(t), m)
			await(t, "the image to be complete", func() bool { return d.image(t, m).Complete })
			name := filepath.Join(d.root, "images", d.image(t, m).ID+suffix)
			d.kill()
			d.unguarded(t)
			p, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			p[len(p)/2] ^= 0xff
			if err := os.WriteFile(name, p, 0o600); err != nil {
				t.Fatal(err)
			}
			d = startDaemon(t, daemonOptions{root: d.root, completion: true})
			st, err := d.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if suffix == bootSuffix && len(st.Images) > 0 {
				t.Errorf("it goes on with %+v", st.Images)
			}
			compareTree(t, fixtureList(t), d.mount(t, q))
		})
	}
}
