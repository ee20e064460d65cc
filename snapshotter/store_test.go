package snapshotter

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// TestNewerStore starts over the store of a newer version, as after a downgrade: it says so and
// touches nothing, and the newer version finds everything again.
func TestNewerStore(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	layer(t, s, "base", "")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(root, "metadata.db")
	change(t, name, func(tx *bolt.Tx) error { _, err := tx.CreateBucket([]byte("v2")); return err })
	if s, err := New(root, nil, nil); err == nil || !strings.Contains(err.Error(), "newer version") || !strings.Contains(err.Error(), name) {
		t.Errorf("opened: %v, %v", s, err)
	}
	if got := names(t, root, snapshotsDir); len(got) != 1 {
		t.Errorf("directories %q, want one", got)
	}
	change(t, name, func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte("v2")) })
	s = open(t, root)
	if _, err := s.Stat(t.Context(), "base"); err != nil {
		t.Error(err)
	}
}

// change changes a store that nobody has open.
func change(t *testing.T, name string, f func(tx *bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(name, 0o600, nil)
	if err == nil {
		err = errors.Join(db.Update(f), db.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestNumberTwice has a store that gives a number again, and then one in which two snapshots
// have it: the files of neither are touched.
func TestNumberTwice(t *testing.T) {
	root := t.TempDir()
	name := filepath.Join(root, "metadata.db")
	s := open(t, root)
	layer(t, s, "base", "")
	layer(t, s, "other", "")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before := names(t, root, snapshotsDir)
	numbers := func(tx *bolt.Tx) *bolt.Bucket { return tx.Bucket([]byte(storeVersion)).Bucket([]byte("snapshots")) }
	change(t, name, func(tx *bolt.Tx) error { return numbers(tx).SetSequence(1) })
	s = open(t, root)
	if _, err := s.Prepare(t.Context(), "new", ""); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a number that is another's: %v", err)
	}
	if _, err := s.Stat(t.Context(), "new"); !errdefs.IsNotFound(err) {
		t.Errorf("refused, and yet there: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	change(t, name, func(tx *bolt.Tx) error {
		return numbers(tx).Bucket([]byte("other")).Put([]byte("id"), numbers(tx).Bucket([]byte("base")).Get([]byte("id")))
	})
	if s, err := New(root, nil, nil); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("opened: %v, %v", s, err)
	}
	if after := names(t, root, snapshotsDir); !slices.Equal(before, after) {
		t.Errorf("directories %q, want %q", after, before)
	}
}

// TestFlippedStore starts over stores with flipped bytes and cut ones: each is opened, or
// refused with a word of what to do; no program ends, then or when it reads and writes.
func TestFlippedStore(t *testing.T) {
	whole := filepath.Join(t.TempDir(), "metadata.db")
	root := t.TempDir()
	s := open(t, root)
	for i := range 40 {
		layer(t, s, "layer"+strconv.Itoa(i), "", snapshots.WithLabels(map[string]string{"label": strings.Repeat("x", 300)}))
	}
	if err := errors.Join(s.Close(), os.Rename(filepath.Join(root, "metadata.db"), whole)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	opened, refused := 0, 0
	for range 100 {
		bad := append([]byte{}, text...)
		switch rnd.IntN(3) {
		case 0:
			bad = bad[:rnd.IntN(len(bad))]
		case 1:
			bad[rnd.IntN(len(bad))] ^= byte(1 + rnd.IntN(255))
		case 2:
			page := rnd.IntN(len(bad)/4096) * 4096
			for i := range 4096 {
				bad[page+i] = byte(rnd.Uint32())
			}
		}
		root := t.TempDir()
		name := filepath.Join(root, "metadata.db")
		if err := os.WriteFile(name, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := New(root, nil, nil)
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), name) {
				t.Errorf("refused: %v; want one that names %s", err, name)
			}
			continue
		}
		opened++
		_ = s.Walk(t.Context(), func(context.Context, snapshots.Info) error { return nil }) // what these find is as it may be
		_, _ = s.Prepare(t.Context(), "new", "layer1")
		_ = s.Remove(t.Context(), "layer2")
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d were opened, %d refused", opened, refused)
	if refused == 0 {
		t.Error("no damage was noticed")
	}
}

// TestNames has names and ids of any length: they are those of the store, not of files.
func TestNames(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "named"))
	for _, name := range []string{"x", "../../escape", "with\x00zero\nand line", strings.Repeat("n", 1000), strings.Repeat("n", maxName)} {
		m, err := r.Prepare(t.Context(), name, top)
		if err != nil {
			t.Errorf("%.20q of %d bytes: %v", name, len(name), err)
			continue
		}
		if text, writable := readIn(t, m); text != "named" || !writable {
			t.Errorf("%.20q reads %q", name, text)
		}
		if err := r.Commit(t.Context(), name+"", name); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%.20q committed under its own name: %v", name, err)
		}
		if err := r.Remove(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	long := strings.Repeat("n", maxName+1)
	_, perr := r.Prepare(t.Context(), long, top)
	_, verr := r.View(t.Context(), "", top)
	prepare(t, r.Snapshotter, "c", top)
	_, terr := r.Prepare(t.Context(), "d", "", with(strings.Repeat("t", maxTarget+1), labelBlob, "true"))
	for what, err := range map[string]error{"prepare": perr, "view": verr, "commit": r.Commit(t.Context(), long, "c"), "target": terr} {
		if !errdefs.IsInvalidArgument(err) || len(err.Error()) > 1000 {
			t.Errorf("%s with a name that cannot be: %.200v", what, err)
		}
	}
	if _, err := r.Prepare(t.Context(), "e", "", with(strings.Repeat("t", maxTarget), labelBlob, "true")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the longest chain id: %v", err)
	}
}
