package torture

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestOutOfMemory has the kernel kill the worker for want of memory below readers, again
// and again. They get the right bytes, or EIO while the kernel has no memory for the
// descriptor of their event, which it denies then without asking.
func TestOutOfMemory(t *testing.T) {
	way := transport(t)
	if _, err := os.Stat(filepath.Join(memoryCgroups, "memory.oom_control")); err != nil {
		testenv.Need(t, "memory cgroup", "needs the memory controller of cgroup v1: "+err.Error())
	}
	seed := newSeed(t)
	one := newImage(t, seed, 120, "zstd")
	m := start(t, daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
	s := &score{mayFail: true}
	n := rounds(t, 3)
	for k := range n {
		point := m.mount(one, "one")
		group := newCgroup(t)
		group.set("memory.limit_in_bytes", 128<<20)
		worker := m.worker()
		group.set("cgroup.procs", worker)
		end := s.loop(one, point, readersAtOnce, seed+uint64(k))
		group.starve(worker)
		m.await("the kernel to kill the worker", func() bool { return group.kills() > 0 })
		m.await("a successor", func() bool { return m.deaths() > k && m.Health(t.Context()) == nil })
		m.recovers(one, point, seed)
		end(t, m)
		m.unmount(point)
		m.evict()
		if m.deaths() != k+1 || s.wrong.Load() > 0 {
			t.Errorf("%d workers died of %d; %s; the first: %s", m.deaths(), k+1, s, s.first)
		}
	}
	m.stop()
	t.Logf("killed for memory %d, %s", n, s)
}

// memoryCgroups is where cgroup v1 has its memory controller.
const memoryCgroups = "/sys/fs/cgroup/memory"

// A cgroup limits the memory of the processes in it.
type cgroup struct {
	t   *testing.T
	dir string
}

// newCgroup makes one, which ends with t; its processes must have ended.
func newCgroup(t *testing.T) cgroup {
	t.Helper()
	dir, err := os.MkdirTemp(memoryCgroups, "erofsd-torture-*")
	if err != nil {
		testenv.Need(t, "memory cgroup", "needs a memory cgroup of its own: "+err.Error())
	}
	t.Cleanup(func() {
		err := syscall.Rmdir(dir)
		for deadline := time.Now().Add(patience); err != nil && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			err = syscall.Rmdir(dir) // busy while a process ends
		}
		if err != nil {
			t.Errorf("remove %s: %v", dir, err)
		}
	})
	return cgroup{t, dir}
}

func (c cgroup) set(name string, value int) {
	c.t.Helper()
	if err := c.write(name, value); err != nil {
		c.t.Fatal(err)
	}
}

func (c cgroup) write(name string, value int) error {
	return os.WriteFile(filepath.Join(c.dir, name), []byte(strconv.Itoa(value)), 0)
}

func (c cgroup) read(name string) string {
	c.t.Helper()
	p, err := os.ReadFile(filepath.Join(c.dir, name))
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.TrimSpace(string(p))
}

// starve has another process in the group want more and more, and the kernel prefer to
// kill the victim for it.
func (c cgroup) starve(victim int) {
	c.t.Helper()
	name := filepath.Join("/proc", strconv.Itoa(victim), "oom_score_adj")
	if err := os.WriteFile(name, []byte("1000"), 0); err != nil {
		c.t.Fatal(err)
	}
	hog := exec.Command("/proc/self/exe")
	hog.Args[0] = hogName
	if err := hog.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		_ = hog.Process.Kill() // the kernel may have done so
		_ = hog.Wait()
	})
	c.set("cgroup.procs", hog.Process.Pid)
}

// runHog takes memory until it is killed.
func runHog() {
	var all [][]byte
	for {
		p := make([]byte, 1<<20)
		for i := range p {
			p[i] = 1
		}
		all = append(all, p)
		time.Sleep(10 * time.Millisecond)
		runtime.KeepAlive(all)
	}
}

// kills is how many processes the kernel has killed for the limit.
func (c cgroup) kills() int {
	c.t.Helper()
	_, number, _ := strings.Cut(c.read("memory.oom_control"), "oom_kill ")
	n, err := strconv.Atoi(number)
	if err != nil {
		c.t.Fatalf("%s: %v", c.dir, err)
	}
	return n
}
