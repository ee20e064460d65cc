package torture

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

// patience is how long anything may take that has no limit of its own. A guest's
// processors are emulated.
const patience = time.Minute

// transport returns the transport of this kernel, or skips t where it has none.
func transport(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	dir := scratch(t)
	if cachefiles.Supported("", dir) == nil {
		return daemon.Cachefiles
	}
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
	return daemon.Fanotify
}

// scratch returns a new directory on a file system that can hold a cache, with a short
// name: sockets lie there.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("EROFSD_TEST_DIR"), "torture-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A machine is a daemon with its keeper, and the mounts that it made.
type machine struct {
	*api.Client
	t      *testing.T
	dir    string
	socket string
	cmd    *exec.Cmd
	ended  chan struct{}
	log    testenv.Buffer
}

// start starts a keeper and waits until its worker serves. script is what its workers get
// as failpoints, a line for each, one after the other.
func start(t *testing.T, o daemon.Options, script ...string) *machine {
	t.Helper()
	return startIn(t, scratch(t), o, script...)
}

// startIn is start in the directory of an earlier machine.
func startIn(t *testing.T, dir string, o daemon.Options, script ...string) *machine {
	t.Helper()
	return startAs(t, dir, o, unprepared, script...)
}

// unprepared is for a keeper that is started as any is.
func unprepared(*exec.Cmd) {}

// startAs is startIn of a keeper whose command is made ready by prepare.
func startAs(t *testing.T, dir string, o daemon.Options, prepare func(*exec.Cmd), script ...string) *machine {
	t.Helper()
	m := &machine{t: t, dir: dir, ended: make(chan struct{})}
	m.socket = filepath.Join(m.dir, "sock")
	m.Client = api.NewClient(m.socket)
	o.Root = filepath.Join(m.dir, "root")
	options, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	m.cmd = exec.Command("/proc/self/exe", m.socket, string(options))
	m.cmd.Args[0] = keeperName
	m.cmd.Stdout, m.cmd.Stderr = &m.log, &m.log
	m.cmd.WaitDelay = 100 * time.Millisecond // a guard may outlive it and hold the pipe
	if len(script) > 0 {
		file := filepath.Join(m.dir, "failpoints")
		if err := os.WriteFile(file, []byte(strings.Join(script, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		m.cmd.Env = append(os.Environ(), "EROFSD_FAILPOINT=@"+file)
	}
	prepare(m.cmd)
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(m.ended)
		_ = m.cmd.Wait() // how it ended is in its state
	}()
	t.Cleanup(m.cleanUp)
	t.Cleanup(func() { total.deaths.Add(int64(m.deaths())) })
	m.await("the daemon to serve", func() bool { return m.Health(t.Context()) == nil })
	return m
}

// await waits until done, which must come to pass while the keeper lives.
func (m *machine) await(what string, done func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(2 * time.Millisecond) {
		if m.hasEnded() {
			m.t.Fatalf("waiting for %s, the keeper ended: %v\n%s", what, m.cmd.ProcessState, m.log.String())
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("waited too long for %s\n%s", what, m.log.String())
		}
	}
}

func (m *machine) hasEnded() bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

// retry does what may meet a worker's death: until it succeeds, or the daemon refuses it.
func (m *machine) retry(what string, do func() error) {
	m.t.Helper()
	m.await(what, func() bool {
		err := do()
		if e := (*api.Error)(nil); errors.As(err, &e) && e.Status != http.StatusServiceUnavailable {
			m.t.Fatalf("%s: %v\n%s", what, err, m.log.String())
		}
		return err == nil
	})
}

// mount mounts i below the machine's directory and returns the place.
func (m *machine) mount(i *image, name string) string {
	m.t.Helper()
	point := filepath.Join(m.dir, name)
	if err := os.MkdirAll(point, 0o755); err != nil {
		m.t.Fatal(err)
	}
	r := api.MountRequest{Mountpoint: point, Bootstrap: i.boot, BlobDir: i.blobs}
	if i.bound != "" {
		r = api.MountRequest{Mountpoint: point, Image: i.bound, DomainID: domain}
	}
	m.retry("mount "+name, func() error {
		_, err := m.Mount(context.Background(), r)
		if e := (*api.Error)(nil); errors.As(err, &e) && e.Status == http.StatusConflict {
			// A worker has died after it had mounted, and before it could say so; perhaps
			// another one just now.
			err = errors.New(e.Message)
			if m.knows(point) {
				return nil
			}
		}
		return err
	})
	return point
}

// knows reports whether the daemon has something mounted at point: a worker may die after
// it was, and before the answer.
func (m *machine) knows(point string) bool {
	s, err := m.Status(context.Background())
	if err != nil {
		return false
	}
	for _, x := range s.Images {
		if x.Mountpoint == point {
			return true
		}
	}
	return false
}

// unmount unmounts what is at point.
func (m *machine) unmount(point string) {
	m.t.Helper()
	m.retry("unmount "+point, func() error {
		err := m.Unmount(context.Background(), api.UnmountRequest{Mountpoint: point})
		if err != nil && m.Health(context.Background()) == nil && !mounted(point) {
			return nil
		}
		return err
	})
}

func mounted(point string) bool {
	on, err := mountinfo.Mounted(point)
	return on || err != nil
}

// worker returns the process id of the worker that serves.
func (m *machine) worker() int {
	m.t.Helper()
	pid := 0
	m.await("a worker", func() bool {
		v, err := m.Version(context.Background())
		pid = v.PID
		return err == nil
	})
	return pid
}

// kill sends s to the worker.
func (m *machine) kill(s syscall.Signal) {
	m.t.Helper()
	if err := syscall.Kill(m.worker(), s); err != nil && !errors.Is(err, syscall.ESRCH) {
		m.t.Fatal(err)
	}
}

// deaths is how many workers have died.
func (m *machine) deaths() int { return strings.Count(m.log.String(), `msg="worker died"`) }

// stop ends the daemon in order: nothing may be left.
func (m *machine) stop() {
	m.t.Helper()
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		m.t.Fatal(err)
	}
	select {
	case <-m.ended:
	case <-time.After(patience):
		m.t.Fatalf("the daemon does not end\n%s", m.log.String())
	}
	if code := m.cmd.ProcessState.ExitCode(); code != 0 {
		m.t.Errorf("exit code %d\n%s", code, m.log.String())
	}
	m.nothingLeft()
}

// nothingLeft fails the test if a mount is left, or a process with the root's lock.
func (m *machine) nothingLeft() {
	m.t.Helper()
	left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(m.dir))
	if err != nil || len(left) > 0 {
		m.t.Errorf("mounts are left: %v, %v", left, err)
	}
	f, err := os.OpenFile(filepath.Join(m.dir, "root", "lock"), os.O_RDWR, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	deadline := time.Now().Add(patience)
	for unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		if time.Now().After(deadline) {
			m.t.Fatal("a process of the daemon is left")
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// cleanUp ends what a failed test has left.
func (m *machine) cleanUp() {
	m.Close()
	if left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(m.dir)); err == nil {
		for _, x := range left {
			_ = unix.Unmount(x.Mountpoint, unix.MNT_DETACH)
		}
	}
	if !m.hasEnded() {
		_ = m.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-m.ended:
		case <-time.After(5 * time.Second):
			_ = m.cmd.Process.Kill()
			<-m.ended
		}
	}
	if m.t.Failed() {
		m.t.Logf("log of the daemon:\n%s", m.log.String())
	}
}
