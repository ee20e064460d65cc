package power

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/internal/daemon"
)

// A tally counts what cuts left.
type tally struct {
	cuts    int
	sent    int64 // bytes that were not flushed at the cuts and are there all the same
	lost    int64 // and those that are not
	total   int64 // bytes of images
	present int64 // of these, in the cache after the cuts
	fetched int64 // compressed, while everything was read
	wrong   int64 // bytes of files that are not what they should be
	failed  int   // cuts after which anything was wrong
}

func (a *tally) add(b tally) {
	a.cuts += b.cuts
	a.sent += b.sent
	a.lost += b.lost
	a.total += b.total
	a.present += b.present
	a.fetched += b.fetched
	a.wrong += b.wrong
	a.failed += b.failed
}

func (a tally) String() string {
	const mib = 1 << 20
	return fmt.Sprintf("%d cuts; not flushed at them: %.1f MiB there, %.1f MiB lost; of %.1f MiB %.1f MiB were present, %.1f MiB (compressed) were fetched again; failed %d, wrong %d bytes",
		a.cuts, float64(a.sent)/mib, float64(a.lost)/mib, float64(a.total)/mib, float64(a.present)/mib, float64(a.fetched)/mib, a.failed, a.wrong)
}

// A checker tries cuts of one log, in its order.
type checker struct {
	log       *Log
	transport string
	images    []*image
	dir       string
	durable   string // a disk as it is after the first replayed entries
	replayed  int
}

// check cuts the power n times in the log of what was written to the disk base. Both may be
// files or block devices.
func check(t *testing.T, base, writes string, k kernel, rnd *rand.Rand, n int) (sum tally) {
	t.Helper()
	f, err := os.Open(writes)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	log := parse(t, f)
	labels, err := log.Labels(labelPlace)
	if err != nil {
		t.Fatal(err)
	}
	cuts := log.Pick(rnd, n, labels)
	if len(cuts) != n {
		t.Fatalf("the log of %d entries has no label: nothing was done", len(log.Entries))
	}
	c := &checker{log: log, transport: k.transport, images: images(t, k.images), dir: workspace(t)}
	c.durable = filepath.Join(c.dir, "durable")
	if err := copySparse(c.durable, base); err != nil {
		t.Fatal(err)
	}
	for i, cut := range cuts {
		one := tally{cuts: 1}
		if !t.Run(fmt.Sprintf("cut-%d-of-%d", i+1, n), func(t *testing.T) { c.try(t, cut, &one) }) {
			one.failed = 1
		}
		sum.add(one)
	}
	return sum
}

// parse reads a log, from a file or a block device.
func parse(t *testing.T, f *os.File) *Log {
	t.Helper()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	log, err := Parse(f, size)
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// try makes the disk as it is after the cut, and looks at what the cache on it says.
func (c *checker) try(t *testing.T, cut Cut, sum *tally) {
	t.Log(cut)
	disk := filepath.Join(c.dir, "disk")
	sum.sent, sum.lost = c.cut(t, cut, disk)
	m := mountFile(t, disk, asUsual)
	defer m.unmount(t)
	p := startDaemon(t, daemon.Options{Root: m.root(), Transport: c.transport, NoCompletion: cut.Seed%2 == 0})
	defer p.stop(t)
	for _, i := range c.images {
		before := i.mount(t, p)
		sum.total += before.BytesTotal
		sum.present += before.BytesPresent
		sum.wrong += i.compare(t)
		after := i.state(t, p)
		sum.fetched += after.BytesFetched
		if after.CorruptChunks > 0 {
			t.Errorf("%s: %d chunks of the backend are corrupt", i.name, after.CorruptChunks)
		}
		i.unmount(t, p)
	}
}

// cut makes the file disk.
func (c *checker) cut(t *testing.T, cut Cut, disk string) (there, lost int64) {
	t.Helper()
	f, err := os.OpenFile(c.durable, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := c.log.Replay(f, c.replayed, cut.Durable); err != nil {
		t.Fatal(err)
	}
	c.replayed = cut.Durable
	if err := copySparse(disk, c.durable); err != nil {
		t.Fatal(err)
	}
	g, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if there, lost, err = c.log.Lose(g, cut); err != nil {
		t.Fatal(err)
	}
	return there, lost
}
