package torture

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/testenv"
)

// memoryLimit is room for a worker, and for what it has to do in these tests.
const memoryLimit = 128 << 20

// cgroupEnv names the cgroup that a worker enters before it does anything. The keeper stays
// outside: it has the kernel spare it, but not every machine that tests lets it.
const cgroupEnv = "EROFSD_TORTURE_CGROUP"

// A cgroup limits the memory of the processes in it, by version 1 or 2 of the interface.
type cgroup struct {
	t   *testing.T
	dir string
}

// newCgroup makes one with memoryLimit, which ends with t; its processes must have ended.
func newCgroup(t *testing.T) cgroup {
	t.Helper()
	parent, limit := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(filepath.Join(parent, limit)); err != nil {
		parent, limit = "/sys/fs/cgroup", "memory.max"
		if err := os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
			testenv.Need(t, "memory cgroup", "needs the memory controller of cgroups: "+err.Error())
		}
	}
	dir, err := os.MkdirTemp(parent, "erofsd-torture-*")
	if err != nil {
		testenv.Need(t, "memory cgroup", "needs a memory cgroup of its own: "+err.Error())
	}
	c := cgroup{t, dir}
	t.Cleanup(c.remove)
	if err := c.write(limit, memoryLimit); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c cgroup) remove() {
	err := syscall.Rmdir(c.dir)
	for deadline := time.Now().Add(patience); err != nil && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		err = syscall.Rmdir(c.dir) // busy while a process ends
	}
	if err != nil {
		c.t.Errorf("remove %s: %v", c.dir, err)
	}
}

func (c cgroup) write(name string, value int) error {
	return os.WriteFile(filepath.Join(c.dir, name), []byte(strconv.Itoa(value)), 0)
}

// confine has the workers of the keeper cmd enter the cgroup, or cmd itself if it is the hog.
func (c cgroup) confine(cmd *exec.Cmd) { cmd.Env = append(cmd.Environ(), cgroupEnv+"="+c.dir) }

// enterCgroup is what workers and the hog do with confine.
func enterCgroup() error {
	dir := os.Getenv(cgroupEnv)
	if dir == "" {
		return nil
	}
	return cgroup{dir: dir}.write("cgroup.procs", os.Getpid())
}

// add moves a process to the cgroup.
func (c cgroup) add(pid int) {
	c.t.Helper()
	if err := c.write("cgroup.procs", pid); err != nil {
		c.t.Fatal(err)
	}
}

// starve has another process in the cgroup want more and more, and the kernel prefer to
// kill the victim for it. end ends that process.
func (c cgroup) starve(victim int) (end func()) {
	c.t.Helper()
	name := filepath.Join("/proc", strconv.Itoa(victim), "oom_score_adj")
	if err := os.WriteFile(name, []byte("1000"), 0); err != nil {
		c.t.Fatal(err)
	}
	hog := exec.Command("/proc/self/exe")
	hog.Args[0] = hogName
	c.confine(hog) // from its start: memory from before would make it the one to be killed
	if err := hog.Start(); err != nil {
		c.t.Fatal(err)
	}
	end = func() {
		_ = hog.Process.Kill() // the kernel may have done so
		_ = hog.Wait()
	}
	c.t.Cleanup(end)
	return end
}

// runHog takes memory until it is killed.
func runHog() int {
	if err := enterCgroup(); err != nil {
		fmt.Fprintln(os.Stderr, "enter the cgroup:", err)
		return 1
	}
	var all [][]byte
	for {
		all = append(all, bytes.Repeat([]byte{1}, 1<<20))
		time.Sleep(10 * time.Millisecond)
		runtime.KeepAlive(all)
	}
}

// kills is how many processes the kernel has killed for the limit.
func (c cgroup) kills() int {
	c.t.Helper()
	var text []byte
	var err error
	for _, name := range []string{"memory.oom_control", "memory.events"} {
		if text, err = os.ReadFile(filepath.Join(c.dir, name)); err == nil {
			break
		}
	}
	_, number, _ := strings.Cut(string(text), "oom_kill ")
	number, _, _ = strings.Cut(number, "\n")
	n, numberErr := strconv.Atoi(number)
	if err != nil || numberErr != nil {
		c.t.Fatalf("%s: %v, %v", c.dir, err, numberErr)
	}
	return n
}
