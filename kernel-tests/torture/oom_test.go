package torture

import (
	"testing"

	"github.com/erofsd/erofsd/internal/daemon"
)

// TestOutOfMemory has the kernel kill the worker for want of memory below readers, again
// and again: another process in its cgroup takes what is there. The worker was started in
// the cgroup, or moved there, when all that it has is charged elsewhere: then what it lacks
// first is what the kernel needs for it.
func TestOutOfMemory(t *testing.T) {
	way := transport(t)
	for _, moved := range []bool{false, true} {
		name := map[bool]string{false: "started", true: "moved"}[moved]
		t.Run(name, func(t *testing.T) { starveWorkers(t, way, moved) })
	}
}

func starveWorkers(t *testing.T, way string, moved bool) {
	group := newCgroup(t)
	seed := newSeed(t)
	one := newImage(t, seed, 120, "zstd")
	prepare := group.confine
	if moved {
		prepare = unprepared
	}
	m := startAs(t, scratch(t), daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true}, prepare)
	s := &score{}
	for k := range rounds(t, 3) {
		point := m.mount(one, "one")
		worker, died, killed := m.worker(), m.deaths(), group.kills()
		if moved {
			group.add(worker)
		}
		wait := s.load(one, point, readersAtOnce, seed+uint64(k))
		end := group.starve(worker)
		m.await("the kernel to kill the worker", func() bool { return m.deaths() > died })
		end()
		m.await("a successor", func() bool { return m.Health(t.Context()) == nil })
		m.recovers(one, point, seed)
		wait(t, m)
		m.unmount(point)
		m.evict()
		// The next worker may have been killed too, while there was still no memory.
		if died, killed := m.deaths()-died, group.kills()-killed; died > killed {
			t.Fatalf("%d workers died, and no more than %d for want of memory", died, killed)
		}
	}
	m.stop()
	t.Logf("workers killed for want of memory: %d; %s", m.deaths(), s)
}
