package torture

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/kernel-tests/harness"
)

// TestTakeoverTime kills workers that have many mounts, and says how long a reader waits
// that asks at that moment for what is in the cache but not in memory.
func TestTakeoverTime(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	n := 40
	if os.Getenv("ROUNDS") != "" {
		n = 200
	}
	m := start(t, daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
	var images []*image
	var points []string
	s := &score{}
	for k := range n {
		i := newImage(t, seed+uint64(k), 3, "none")
		point := m.mount(i, fmt.Sprintf("m%d", k))
		images, points = append(images, i), append(points, point)
		s.firstByte(t, i, point) // the large file stays away
	}
	var waits []time.Duration
	for k := range rounds(t, 10) {
		k %= n
		if err := harness.DropFile(filepath.Join(points[k], small)); err != nil {
			t.Fatal(err)
		}
		deaths := m.deaths()
		m.kill(syscall.SIGKILL)
		start := time.Now()
		s.firstByte(t, images[k], points[k])
		waits = append(waits, time.Since(start))
		m.await("a successor", func() bool { return m.deaths() > deaths && m.Health(t.Context()) == nil })
	}
	if s.bad() {
		t.Errorf("%s; the first: %s", s, s.first)
	}
	for _, p := range points {
		m.unmount(p)
	}
	m.stop()
	slices.Sort(waits)
	t.Logf("%d mounts, %d kills: a read takes %s (median), %s (p99), %s (most)", n, len(waits), waits[len(waits)/2], waits[len(waits)*99/100], waits[len(waits)-1])
}

// small is a file of every image of three.
const small = "d1/f1"

// firstByte reads the first byte of that.
func (s *score) firstByte(t *testing.T, i *image, point string) {
	t.Helper()
	f, err := os.Open(filepath.Join(point, small))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s.piece(f, 0, i.files[small][:1])
}
