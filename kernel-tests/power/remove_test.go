package power

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// TestRemoved cuts the power just after an image was removed. Its files may come back then,
// and on file systems that do not order data and metadata with data of others in them; so
// nothing may come back that says they are whole.
func TestRemoved(t *testing.T) {
	needFanotify(t)
	dir := workspace(t)
	d := newLoggedDisk(dir)
	d.record(t, "commit=60,noinit_itable", func(t *testing.T, disk *mounted) {
		p := startDaemon(t, daemon.Options{Root: disk.root(), Transport: daemon.Fanotify})
		i := images(t, []string{"zstd"})[0]
		i.mount(t, p)
		if err := i.read(i.files); err != nil {
			t.Fatal(err)
		}
		await(t, "the image to be complete", func() bool { return i.state(t, p).Complete })
		i.unmount(t, p)
		if marks := marksOf(t, disk); len(marks) == 0 {
			t.Fatal("a complete image has no mark: nothing is tried")
		}
		if err := p.Remove(t.Context(), api.RemoveRequest{Image: i.id}); err != nil {
			t.Fatal(err)
		}
		disk.label(t, "removed")
		p.stop(t)
	})
	f, err := os.Open(d.writes)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	log := parse(t, f)
	labels, err := log.Labels(labelPlace)
	if err != nil {
		t.Fatal(err)
	}
	c := &checker{log: log, dir: dir, durable: filepath.Join(dir, "durable")}
	if err := copySparse(c.durable, d.base); err != nil {
		t.Fatal(err)
	}
	after := filepath.Join(dir, "after")
	c.cut(t, log.Cut(slices.Index(labels, "removed"), LoseAll, 0), after)
	if marks := marksOf(t, mountFile(t, after, asUsual)); len(marks) > 0 {
		t.Errorf("after the cut the cache says that these are whole, which were removed: %q", marks)
	}
}

// marksOf lists what says of blobs that they are whole and durable.
func marksOf(t *testing.T, disk *mounted) []string {
	t.Helper()
	if _, err := os.Stat(filepath.Join(disk.root(), "cache")); err != nil && !errors.Is(err, unix.ENOENT) {
		t.Fatal(err)
	}
	marks, err := filepath.Glob(filepath.Join(disk.root(), "cache", "*.clean"))
	if err != nil {
		t.Fatal(err)
	}
	return marks
}
