package power

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

// What a guest of TestOneCache is to do.
const (
	guestFirst = "first" // fill a new cache
	guestAgain = "again" // read what this machine has fetched meanwhile
)

// fetchedMark is before how much of the bound image a guest has fetched.
const fetchedMark = "fetched: "

// TestOneCache takes a disk with a cache from a machine with cachefiles to one with
// fanotify and back, as who boots another kernel does: from a guest to a loop device here,
// to the guest, and here again. What was fetched is not fetched again: from the second
// boot on the backend has nothing of it.
func TestOneCache(t *testing.T) {
	switch step := os.Getenv("POWER_GUEST"); step {
	case "":
	case guestFirst:
		first(t)
		return
	default:
		again(t, mountDevice(t, "/dev/vdc", asUsual), daemon.Cachefiles)
		return
	}
	needFanotify(t)
	testenv.Tool(t, "qemu-system-x86_64")
	const row = "6.1"
	if _, err := guestkernel.Find(t.Context(), row); errors.Is(err, fs.ErrNotExist) {
		testenv.Need(t, "kernel-"+row, "needs the guest kernel "+row+": make kernel builds it")
	} else if err != nil {
		t.Fatal(err)
	}
	programs := t.TempDir()
	vm, self := filepath.Join(programs, "vm"), filepath.Join(programs, "power.test")
	build(t, "build", "-o", vm, "../vm")
	build(t, "test", "-c", "-o", self, ".")
	g := &guest{vm: vm, self: self, row: row, test: "TestOneCache", while: time.Second}

	disk := filepath.Join(workspace(t), "disk")
	makeDisk(t, disk)
	out := g.run(t, rand.Uint64(), 0, guestFirst, "-disk", disk)
	fetched := int64(0)
	_, line, found := strings.Cut(out, fetchedMark)
	if _, err := fmt.Sscan(line, &fetched); !found || err != nil || fetched == 0 {
		t.Fatalf("the guest has fetched nothing: %v\n%s", err, out)
	}
	ok := t.Run("here", func(t *testing.T) { here(t, mountFile(t, disk, asUsual), fetched) }) &&
		t.Run("back", func(t *testing.T) { g.run(t, rand.Uint64(), 0, guestAgain, "-disk", disk) })
	if !ok {
		return
	}
	t.Run("here again", func(t *testing.T) {
		m := mountFile(t, disk, asUsual)
		again(t, m, daemon.Fanotify)
		emptied(t, m)
	})
}

// oneImages are one that the first machine reads all of, a bound one that it reads a part
// of, and one that only the second machine knows.
func oneImages(t *testing.T) (whole, part, second *image) {
	t.Helper()
	list := images(t, []string{"zstd", "sha256-64k"})
	return list[0], list[2], list[1]
}

func oneDaemon(t *testing.T, disk *mounted, transport string) *process {
	t.Helper()
	p := startDaemon(t, daemon.Options{Root: disk.root(), Transport: transport, NoCompletion: true})
	st, err := p.Status(t.Context())
	if err != nil || st.Transport != transport {
		t.Fatalf("the daemon uses %q (%v), want %s", st.Transport, err, transport)
	}
	return p
}

// first is the guest's boot with an empty disk.
func first(t *testing.T) {
	disk := mountDevice(t, "/dev/vdc", asUsual)
	p := oneDaemon(t, disk, daemon.Cachefiles)
	whole, part, _ := oneImages(t)
	whole.mount(t, p)
	if err := whole.read(whole.files); err != nil {
		t.Fatal(err)
	}
	await(t, "the image to be complete", func() bool { return whole.state(t, p).Complete })
	part.mount(t, p)
	if err := part.read(part.files[:len(part.files)/2]); err != nil {
		t.Fatal(err)
	}
	fmt.Println(fetchedMark, part.state(t, p).BytesFetched)
	p.stop(t)
	disk.unmount(t)
}

// here is the boot of this machine after that.
func here(t *testing.T, disk *mounted, fetched int64) {
	p := oneDaemon(t, disk, daemon.Fanotify)
	whole, part, second := oneImages(t)
	if kept(t, p) != 2 {
		t.Errorf("%d images are kept, want those of the guest, 2", kept(t, p))
	}
	whole.withoutBackend(t)
	whole.mount(t, p)
	whole.compare(t)
	whole.asksNothing(t, p)

	total := size(t, part.blobs)
	part.mount(t, p)
	part.compare(t)
	rest := part.state(t, p).BytesFetched
	t.Logf("of %d bytes of the bound image the guest has fetched %d, and this machine %d", total, fetched, rest)
	if rest == 0 || rest > total-fetched/2 {
		t.Errorf("%d bytes fetched of an image of %d, of which %d were there", rest, total, fetched)
	}
	second.mount(t, p)
	second.compare(t)
	for _, i := range []*image{whole, part, second} {
		await(t, i.name+" to be complete", func() bool { return i.state(t, p).Complete })
		i.unmount(t, p)
	}
	p.stop(t)
	if left := objects(t, disk); len(left) > 0 {
		t.Errorf("the kernel's files of blobs are still there though all was taken from them: %q", left)
	}
	disk.unmount(t)
}

// again is any later boot.
func again(t *testing.T, disk *mounted, transport string) {
	p := oneDaemon(t, disk, transport)
	whole, part, second := oneImages(t)
	if kept(t, p) != 3 {
		t.Errorf("%d images are kept, want 3", kept(t, p))
	}
	for _, i := range []*image{whole, part, second} {
		i.withoutBackend(t)
		i.mount(t, p)
		i.compare(t)
		i.asksNothing(t, p)
		await(t, i.name+" to be complete", func() bool { return i.state(t, p).Complete })
		i.unmount(t, p)
	}
	p.stop(t)
	if transport == daemon.Cachefiles {
		files, err := filepath.Glob(filepath.Join(disk.root(), "cache", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if filepath.Ext(f) != ".meta" {
				t.Errorf("%s is still there though all was taken from it", filepath.Base(f))
			}
		}
		disk.unmount(t)
	}
}

// emptied has the cache made as small as it can be: nothing of either transport stays.
func emptied(t *testing.T, disk *mounted) {
	t.Helper()
	p := oneDaemon(t, disk, daemon.Fanotify)
	c, err := p.Evict(t.Context(), api.EvictRequest{})
	if err != nil || c.Bytes != 0 || c.Images != 0 {
		t.Errorf("after everything was evicted the cache has %+v (%v)", c, err)
	}
	p.stop(t)
	if left, err := filepath.Glob(filepath.Join(disk.root(), "fscache", "cache", "*")); err != nil || len(left) > 0 {
		t.Errorf("left of cachefiles: %q (%v)", left, err)
	}
	disk.unmount(t)
}

// withoutBackend takes the image's blobs away.
func (i *image) withoutBackend(t *testing.T) { i.blobs = t.TempDir() }

func (i *image) asksNothing(t *testing.T, p *process) {
	t.Helper()
	if m := i.state(t, p); m.BackendRequests != 0 || m.BytesFetched != 0 {
		t.Errorf("%s: %d requests and %d bytes for what this disk has", i.name, m.BackendRequests, m.BytesFetched)
	}
}

// kept is how many images the daemon lists.
func kept(t *testing.T, p *process) int {
	t.Helper()
	st, err := p.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return len(st.Kept)
}

// size is how many bytes the files of dir have.
func size(t *testing.T, dir string) (n int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		n += info.Size()
	}
	return n
}

// objects lists the kernel's files of blobs: those that a chunk table is kept for.
func objects(t *testing.T, disk *mounted) (list []string) {
	t.Helper()
	tables, err := filepath.Glob(filepath.Join(disk.root(), "cache", "*.meta"))
	if err != nil || len(tables) == 0 {
		t.Fatalf("no tables are kept: %v", err)
	}
	for _, table := range tables {
		id := strings.TrimSuffix(filepath.Base(table), ".meta")
		found, err := filepath.Glob(filepath.Join(disk.root(), "fscache", "cache", "*", "*", "D"+id))
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, found...)
	}
	return list
}
