package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/testenv"
)

// open opens a snapshotter that ends with t.
func open(t *testing.T, root string, opts ...Opt) *Snapshotter {
	t.Helper()
	testenv.Root(t)
	s, err := New(root, nil, nil, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// prepare prepares a snapshot and returns its only mount.
func prepare(t *testing.T, s *Snapshotter, key, parent string, opts ...snapshots.Opt) mount.Mount {
	t.Helper()
	m, err := s.Prepare(t.Context(), key, parent, opts...)
	return only(t, m, err)
}

func only(t *testing.T, m []mount.Mount, err error) mount.Mount {
	t.Helper()
	if err != nil || len(m) != 1 {
		t.Fatalf("mounts %v, error %v", m, err)
	}
	return m[0]
}

// layer commits a layer with one file over parent.
func layer(t *testing.T, s *Snapshotter, name, parent string, opts ...snapshots.Opt) {
	t.Helper()
	m := prepare(t, s, "extract-"+name, parent, opts...)
	if err := os.WriteFile(filepath.Join(upperOf(m), name), []byte(name), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), name, "extract-"+name, opts...); err != nil {
		t.Fatal(err)
	}
}

// upperOf is the directory that is written to through m.
func upperOf(m mount.Mount) string {
	for _, o := range m.Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	return m.Source
}

// await waits until ok.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after 30 s", what)
		}
	}
}

// names lists a directory.
func names(t *testing.T, elem ...string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// TestRemoveLeavesNothing removes a tree of files; nothing of it stays.
func TestRemoveLeavesNothing(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	m := prepare(t, s, "c", "")
	deep := filepath.Join(m.Source, "a", "b")
	if err := os.MkdirAll(deep, 0o500); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(deep, fmt.Sprint(i)), nil, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Remove(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(t.Context(), "c"); !errdefs.IsNotFound(err) {
		t.Errorf("stat of what was removed: %v", err)
	}
	await(t, "the files go", func() bool { return len(names(t, root, snapshotsDir)) == 0 && len(names(t, root, trashDir)) == 0 })
}

// TestStartAfterCrash starts over what a crash in the middle of anything leaves.
func TestStartAfterCrash(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	layer(t, s, "base", "")
	prepare(t, s, "c", "base")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"new/1234/fs", "snapshots/77/fs", "trash/5-99/snapshot/fs"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, root)
	if left := names(t, root, newDir); len(left) > 0 {
		t.Errorf("%q were not completed and are there still", left)
	}
	await(t, "garbage goes", func() bool { return len(names(t, root, snapshotsDir)) == 2 && len(names(t, root, trashDir)) == 0 })
	if _, err := s.Mounts(t.Context(), "c"); err != nil {
		t.Error(err)
	}
	usage, err := s.Usage(t.Context(), "base")
	if err != nil || usage.Size == 0 || usage.Inodes != 2 {
		t.Errorf("usage of the layer: %+v, %v", usage, err)
	}
}

// TestFailedPrepareLeavesNothing asks for what cannot be.
func TestFailedPrepareLeavesNothing(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	prepare(t, s, "active", "")
	for _, c := range []struct {
		name, key, parent string
		labels            map[string]string
		is                func(error) bool
	}{
		{"no parent", "a", "missing", nil, errdefs.IsNotFound},
		{"parent active", "b", "active", nil, errdefs.IsInvalidArgument},
		{"twice", "active", "", nil, errdefs.IsAlreadyExists},
		{"bad mapping", "c", "", map[string]string{labelUIDMapping: "0:x:1"}, errdefs.IsInvalidArgument},
		{"root not mapped", "d", "", map[string]string{labelUIDMapping: "1:100:1"}, errdefs.IsInvalidArgument},
	} {
		if _, err := s.Prepare(t.Context(), c.key, c.parent, snapshots.WithLabels(c.labels)); !c.is(err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if left := names(t, root, newDir); len(left) > 0 {
		t.Errorf("left in new: %q", left)
	}
	if got := names(t, root, snapshotsDir); len(got) != 1 {
		t.Errorf("directories of snapshots: %q, want one", got)
	}
}

// TestShiftedIDs has a container's root owned by what its root is mapped to, and the mount
// options say so.
func TestShiftedIDs(t *testing.T) {
	s := open(t, t.TempDir())
	layer(t, s, "base", "")
	m := prepare(t, s, "c", "base", snapshots.WithLabels(map[string]string{labelUIDMapping: "0:1000:10,10:5000:1", labelGIDMapping: "5:1:1,0:2000:1"}))
	var st syscall.Stat_t
	if err := syscall.Stat(upperOf(m), &st); err != nil || st.Uid != 1000 || st.Gid != 2000 {
		t.Errorf("the upper directory belongs to %d:%d, %v; want 1000:2000", st.Uid, st.Gid, err)
	}
	for _, want := range []string{"uidmap=0:1000:10,10:5000:1", "gidmap=5:1:1,0:2000:1"} {
		if !strings.Contains(strings.Join(m.Options, " "), want) {
			t.Errorf("%s is not in %q", want, m.Options)
		}
	}
}

// TestSecondProcess refuses a directory that is in use.
func TestSecondProcess(t *testing.T) {
	t.Parallel() // it waits
	root := t.TempDir()
	open(t, root)
	if s, err := New(root, nil, nil); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("opened twice: %v, %v", s, err)
	}
}

// TestDamagedStore says what is wrong.
func TestDamagedStore(t *testing.T) {
	root := t.TempDir()
	name := filepath.Join(root, "metadata.db")
	if err := os.WriteFile(name, []byte(strings.Repeat("no database", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(root, nil, nil); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("error %v, want one that names %s", err, name)
	}
}

// TestWalkEnds ends a walk when its caller leaves, and walks over nothing.
func TestWalkEnds(t *testing.T) {
	s := open(t, t.TempDir())
	visit := func(context.Context, snapshots.Info) error { return nil }
	if err := s.Walk(t.Context(), visit); err != nil {
		t.Errorf("walk over nothing: %v", err)
	}
	prepare(t, s, "a", "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Walk(ctx, visit); !errors.Is(err, context.Canceled) {
		t.Errorf("walk of somebody who left: %v", err)
	}
}

// TestCleanupEmptiesTrash returns when everything is gone.
func TestCleanupEmptiesTrash(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	for i := range 50 {
		key := fmt.Sprint("c", i)
		prepare(t, s, key, "")
		if err := s.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(names(t, root, snapshotsDir)) + len(names(t, root, trashDir)); n > 0 {
		t.Errorf("%d directories are left", n)
	}
}
