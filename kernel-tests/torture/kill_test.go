package torture

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/internal/testenv"
)

// readersAtOnce is how many readers a round has.
const readersAtOnce = 16

// newSeed is $SEED, or a new one; it is printed.
func newSeed(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("SEED: %v", err)
		}
	}
	t.Logf("SEED=%d", seed)
	return seed
}

// rounds is $ROUNDS, or short.
func rounds(t *testing.T, short int) int {
	t.Helper()
	s := os.Getenv("ROUNDS")
	if s == "" {
		return short
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("ROUNDS is %q: want a number", s)
	}
	return n
}

// TestKillMatrix kills the worker at every named place, while readers compare every byte
// and images come and go: by a signal, by a crash, and for want of memory in turn. Nobody
// may notice.
func TestKillMatrix(t *testing.T) {
	if !failpoint.Enabled {
		testenv.Need(t, "failpoints", "build the test with -tags failpoint")
	}
	way := transport(t)
	seed := newSeed(t)
	one, two := newImage(t, seed, 120, "zstd"), newImage(t, seed+1, 20, "none")
	deaths := []string{"kill", "segv", "oom"}
	for _, name := range failpoint.Names {
		if !on(way, name) {
			continue
		}
		for first, death := range deaths {
			t.Run(name+"/"+death, func(t *testing.T) {
				prepare := unprepared
				if death == "oom" {
					prepare = newCgroup(t).confine
				}
				for n := first; n < rounds(t, 3); n += len(deaths) {
					r := rand.New(rand.NewPCG(seed, uint64(n)))
					killAt(t, prepare, way, name, death, r, one, two)
				}
			})
		}
	}
}

// on reports whether the place is the worker's, and on the way of this transport.
func on(way, name string) bool {
	switch pkg, _, _ := strings.Cut(name, "."); pkg {
	case "snapshotter", "grpc":
		return false // kernel-tests/containerd kills there
	}
	for _, other := range []string{daemon.Fanotify, daemon.Cachefiles} {
		if other != way && strings.Contains(name, other) {
			return false
		}
	}
	// With cachefiles there are no marks of a clean end, and only the kernel evicts.
	return way == daemon.Fanotify || !strings.Contains(name, "evict") && !strings.HasPrefix(name, "blobmgr.clean") && name != "blobmgr.sync"
}

// killAt has a worker die at the place called name, one hit or another.
func killAt(t *testing.T, prepare func(*exec.Cmd), way, name, death string, r *rand.Rand, one, two *image) {
	t.Helper()
	script := []string{fmt.Sprintf("%s=%s@%d", name, death, 1+r.IntN(often(name)))}
	if strings.Contains(name, "takeover") {
		script = []string{way + ".filled=kill@5", name + "=" + death}
	}
	o := daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: r.IntN(2) == 0}
	evict := strings.Contains(name, "evict")
	if evict {
		o.High, o.Low, o.Grace = 2<<20, 3<<19, 200*time.Millisecond
	}
	m := startAs(t, scratch(t), o, prepare, script...)
	point := m.mount(one, "one")
	s := &score{}
	wait := s.readers(one, point, readersAtOnce, r.Uint64())
	if evict {
		wait(t, m)
		wait = s.load(one, point, readersAtOnce, r.Uint64())
	}
	churn(m, s, two, r)
	if !evict {
		wait(t, m)
	}
	m.await("every worker of the script to die", func() bool { return m.deaths() >= len(script) })
	if evict {
		wait(t, m)
	}
	m.worker()
	s.readers(one, point, 2, r.Uint64())(t, m) // and all is there afterwards
	m.unmount(point)
	m.stop()
	if t.Failed() {
		t.Fatalf("%q: %s", script, s)
	}
}

// often is a bound for the hit at which a worker dies: below how often a round comes by.
func often(name string) int {
	switch pkg, what, _ := strings.Cut(name, "."); {
	case pkg == "daemon":
		return 1
	case strings.Contains(what, "clean"), strings.Contains(what, "evict"), what == "sync", what == "closed", strings.HasPrefix(what, "copen"):
		return 1
	default:
		return 8
	}
}

// churn mounts another image, reads it, and lets go of it.
func churn(m *machine, s *score, i *image, r *rand.Rand) {
	point := m.mount(i, "two")
	s.readers(i, point, 2, r.Uint64())(m.t, m)
	m.unmount(point)
	m.evict()
}

// evict empties the cache of what is not in use.
func (m *machine) evict() {
	m.t.Helper()
	m.retry("evict", func() error {
		_, err := m.Evict(context.Background(), api.EvictRequest{})
		return err
	})
}

// TestSignals kills workers from outside, one after the other, below 64 readers.
func TestSignals(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one := newImage(t, seed, 200, "zstd")
	m := start(t, daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
	point := m.mount(one, "one")
	s := &score{}
	wait := s.readers(one, point, 64, seed)
	for n, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGKILL} {
		m.kill(sig)
		m.await("a successor", func() bool { return m.deaths() > n && m.Health(context.Background()) == nil })
	}
	wait(t, m)
	m.unmount(point)
	m.stop()
	t.Log(s)
}
