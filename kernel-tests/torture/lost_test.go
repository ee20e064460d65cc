package torture

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestLostTable: the chunk table of a blob is lost, and what the kernel's cache has of it is
// wrong. The workers that find that die before and after they removed it; none after them
// trusts it.
func TestLostTable(t *testing.T) {
	if !failpoint.Enabled {
		testenv.Need(t, "failpoints", "build the test with -tags failpoint")
	}
	testenv.Root(t)
	dir := scratch(t)
	testenv.Kernel(t, "cachefiles", cachefiles.Supported("", dir))
	seed := newSeed(t)
	one := newImage(t, seed, 40, "zstd")
	o := daemon.Options{Transport: daemon.Cachefiles, FillTimeout: patience, NoCompletion: true}
	m := startIn(t, dir, o)
	point := m.mount(one, "one")
	(&score{}).readers(one, point, 2, seed)(t, m)
	m.unmount(point)
	m.stop()
	loseTables(t, filepath.Join(dir, "root"))

	m = startIn(t, dir, o, "daemon.cachefiles.disown=kill", "daemon.cachefiles.disowned=kill")
	point = m.mount(one, "one")
	if n := m.deaths(); n != 2 {
		t.Errorf("%d workers died, want 2", n)
	}
	(&score{}).readers(one, point, 2, seed+1)(t, m)
	m.unmount(point)
	m.stop()
}

// loseTables removes the chunk tables below root, and makes the data wrong that the kernel
// has there.
func loseTables(t *testing.T, root string) {
	t.Helper()
	tables, err := filepath.Glob(filepath.Join(root, "cache", "*.meta"))
	if err != nil || len(tables) == 0 {
		t.Fatalf("chunk tables: %q, %v", tables, err)
	}
	for _, name := range tables {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	garbled := 0
	err = filepath.WalkDir(filepath.Join(root, "fscache", "cache"), func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err != nil || st.Size() < 1<<20 { // a bootstrap, which is known by its digest
			return err
		}
		garbled++
		return garble(name, st.Size())
	})
	if err != nil || garbled == 0 {
		t.Fatalf("garbled %d files of the kernel: %v", garbled, err)
	}
}

// garble writes over all of a file without a hole.
func garble(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 64<<10)
	for i := range p {
		p[i] = 'x'
	}
	for off := int64(0); off < size; off += int64(len(p)) {
		if _, err := f.WriteAt(p[:min(int64(len(p)), size-off)], off); err != nil {
			return err
		}
	}
	return syscall.Fsync(int(f.Fd()))
}
