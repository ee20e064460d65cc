package torture

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// A soak has images come and go below readers, and what happened so far.
type soak struct {
	t      *testing.T
	m      *machine
	l      *liar
	r      *rand.Rand
	images []*image
	mounts []*soaked // now

	s                 *score
	mounted, upgrades int
	begun, end        time.Time
	tenths            [10]memory // what the daemon took in each tenth of the time
}

// A memory is what the daemon took in a while. A worker lives for seconds and grows in them,
// so only means are compared.
type memory struct{ samples, kilobytes int }

func (m memory) mean() int { return m.kilobytes / max(m.samples, 1) }

// A soaked image is mounted and read.
type soaked struct {
	i     *image
	point string
	end   func(t *testing.T, m *machine)
}

// TestSoak does everything at once for $MINUTES: images of a registry that lies now and then
// come and go in a cache that is too small for all, workers are killed and upgraded, and
// readers compare every byte. What cannot be had reads as EIO.
func TestSoak(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	k := &soak{t: t, r: rand.New(rand.NewPCG(seed, 0)), s: &score{mayFail: true}, begun: time.Now()}
	for n := range uint64(4) {
		k.images = append(k.images, newImage(t, seed+n, 60, []string{"zstd", "none"}[n%2]))
	}
	k.l = newLiar(t, seed, k.images...)
	pause := time.Second
	duration := howLong(t, 10*time.Second)
	if duration > time.Minute {
		pause = 5 * time.Second
	}
	k.end = k.begun.Add(duration)
	// The limit is a little above one image.
	k.m = start(t, daemon.Options{
		Transport: way, FillTimeout: 5 * time.Second, NoCompletion: true, High: 4 << 20, Grace: time.Second,
	})
	for n, i := range k.images {
		k.m.bind(i, fmt.Sprintf("image-%d", n), k.l)
	}
	k.l.lying.Store(true)
	stop := k.m.killEvery(pause)
	for time.Now().Before(k.end) && k.s.wrong.Load() == 0 {
		k.step()
	}
	kills := stop()
	k.finish()
	for _, i := range k.images {
		k.m.forget(i)
	}
	k.m.stop()
	warm, late := k.tenths[1].mean(), k.tenths[9].mean()
	t.Logf("minutes %.1f, mounts %d, reads %d, wrong %d, EIO %d, kills %d, upgrades %d, lies %d, memory %d kB after a tenth, %d kB in the last, %+.2f %%",
		time.Since(k.begun).Minutes(), k.mounted, k.s.reads.Load(), k.s.wrong.Load(), k.s.failed.Load(),
		kills, k.upgrades, k.l.lies.Load(), warm, late, 100*float64(late-warm)/float64(max(warm, 1)))
	if duration >= time.Hour && late > warm+warm/100 {
		t.Errorf("the daemon grows: %v", k.tenths)
	}
	if k.s.wrong.Load() > 0 {
		t.Errorf("%s; the first: %s", k.s, k.s.first)
	}
	if kills == 0 || k.l.lies.Load() == 0 || k.mounted == 0 || k.s.reads.Load() == k.s.failed.Load() {
		t.Error("nothing was done to the readers")
	}
}

// step does one thing or another.
func (k *soak) step() {
	k.t.Helper()
	time.Sleep(time.Duration(k.r.IntN(200)) * time.Millisecond) // any moment will do
	switch n := k.r.IntN(20); {
	case n < 8 && len(k.mounts) < len(k.images):
		k.mount()
	case n < 16 && len(k.mounts) > 0:
		k.unmount(k.r.IntN(len(k.mounts)))
	case n == 16:
		// A worker that is killed meanwhile does not answer; the next one is none of ours.
		if k.m.Upgrade(context.Background(), api.UpgradeRequest{}) == nil {
			k.upgrades++
		}
	case n > 16:
		k.l.lying.Store(!k.l.lying.Load())
	}
	k.weigh()
}

// weigh takes a sample of the memory, but not while a worker is replaced.
func (k *soak) weigh() {
	v, err := k.m.Version(context.Background())
	if err != nil {
		return
	}
	keeper, worker := k.m.resident(k.m.cmd.Process.Pid), k.m.resident(v.PID)
	tenth := int(10 * time.Since(k.begun) / k.end.Sub(k.begun))
	if keeper > 0 && worker > 0 && tenth < len(k.tenths) {
		k.tenths[tenth].samples++
		k.tenths[tenth].kilobytes += keeper + worker
	}
}

// mount mounts an image that is not, while the registry is well: it has to be opened.
func (k *soak) mount() {
	k.t.Helper()
	lying := k.l.lying.Swap(false)
	defer k.l.lying.Store(lying)
	i := k.images[0] // the one that was not mounted for longest
	k.images = append(k.images[1:], i)
	for _, x := range k.mounts {
		if x.i == i {
			return
		}
	}
	point := k.m.mount(i, i.bound)
	k.mounted++
	k.mounts = append(k.mounts, &soaked{i, point, k.s.loop(i, point, 4, k.r.Uint64())})
}

func (k *soak) unmount(n int) {
	k.t.Helper()
	x := k.mounts[n]
	k.mounts = append(k.mounts[:n], k.mounts[n+1:]...)
	x.end(k.t, k.m)
	k.m.unmount(x.point)
}

// finish ends the readers. Once the registry is well everything reads right.
func (k *soak) finish() {
	k.t.Helper()
	k.l.lying.Store(false)
	for len(k.mounts) > 0 {
		x := k.mounts[0]
		x.end(k.t, k.m)
		k.m.recovers(x.i, x.point, k.r.Uint64())
		k.m.unmount(x.point)
		k.mounts = k.mounts[1:]
	}
}

// resident is what a process takes in kilobytes, 0 if it has ended.
func (m *machine) resident(pid int) int {
	m.t.Helper()
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(p), "VmRSS:")
	n, _ := strconv.Atoi(strings.TrimSpace(strings.SplitN(rest, "kB", 2)[0])) // a zombie has none
	return n
}
