package torture

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/internal/daemon"
)

// guards returns the process ids of m's guards.
func (m *machine) guards() (pids []int) {
	m.t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		m.t.Fatal(err)
	}
	cache := filepath.Join(m.dir, "root", "cache")
	for _, name := range all {
		text, err := os.ReadFile(name)
		if err != nil || !daemon.IsGuard(strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")) || !strings.HasSuffix(string(text), cache+"\x00") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// guard waits for the one guard that m has, which is not the process that was one before.
func (m *machine) guard(before int) (pid int) {
	m.t.Helper()
	m.await("a guard", func() bool {
		all := m.guards()
		if len(all) == 1 {
			pid = all[0]
		}
		return len(all) == 1 && pid != before
	})
	return pid
}

// TestGuardKilled kills the guard alone, below readers: nobody notices, there is another
// one at once, and it does what it is for when keeper and worker are killed.
func TestGuardKilled(t *testing.T) {
	if transport(t) != daemon.Fanotify {
		t.Skip("there is no guard without fanotify: cachefiles fails closed")
	}
	seed := newSeed(t)
	r := rand.New(rand.NewPCG(seed, 0))
	one := newImage(t, seed, 120, "zstd")
	m := start(t, daemon.Options{Transport: daemon.Fanotify, FillTimeout: patience, NoCompletion: true})
	point := m.mount(one, "one")
	s := &score{}
	for range rounds(t, 3) {
		guard := m.guard(0)
		end := s.load(one, point, readersAtOnce, r.Uint64())
		before := s.reads.Load()
		m.await("a read", func() bool { return s.reads.Load() > before+r.Int64N(20) })
		if err := syscall.Kill(guard, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		m.guard(guard)
		end(t, m)
	}
	if n := m.deaths(); n > 0 {
		t.Errorf("%d workers died: they were to hand over", n)
	}
	m.worker()
	m.killTogether()
	dead := &score{mayFail: true}
	dead.start(one, point, 2, seed)(t, m)
	if dead.wrong.Load() > 0 || dead.failed.Load() == 0 {
		t.Errorf("with nobody but the guard: %s; the first: %s", dead, dead.first)
	}
	if err := syscall.Unmount(point, 0); err != nil {
		t.Error(err)
	}
	m.nothingLeft()
	t.Log(s)
}
