package systemd

import (
	"bytes"
	"cmp"
	"errors"
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

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// patience is how long anything may take that has no limit of its own.
const patience = time.Minute

// envPrograms says where erofsd and erofsctl are.
const envPrograms = "SYSTEMD_PROGRAMS"

// A setup says how erofsd is installed.
type setup struct {
	unit   string // of configs/systemd, default erofsd.service
	dropIn string // put over it, "" is nothing
	fresh  bool   // nothing of it is installed; the files to do so are in /source
}

func TestMain(m *testing.M) {
	if os.Args[0] == initName {
		fmt.Fprintln(os.Stderr, initName+":", runInit(os.Args[1:]))
		os.Exit(1)
	}
	testenv.Main(m)
}

// A machine has a systemd of its own.
type machine struct {
	*api.Client
	t *testing.T
	setup
	dir   string
	pid   int // of its systemd
	ended chan struct{}
	said  testenv.Buffer
}

// boot starts a machine with erofsd installed as configs/systemd has it, and not yet
// started.
func boot(t *testing.T, s setup) *machine {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("EROFSD_TEST_DIR"), "erofsd-systemd-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s.unit = cmp.Or(s.unit, "erofsd.service")
	m := &machine{t: t, setup: s, dir: dir, ended: make(chan struct{})}
	m.install()
	m.start()
	t.Cleanup(m.powerOff)
	m.await("systemd", func() bool {
		state, _ := m.try("systemctl", "is-system-running") // fails in every state but "running"
		return strings.TrimSpace(state) == "running" || strings.TrimSpace(state) == "degraded"
	})
	m.Client = api.NewClient(m.path("/run/erofsd/erofsd.sock"))
	t.Cleanup(func() { m.Client.Close() })
	return m
}

// install makes what the machine has of its own.
func (m *machine) install() {
	m.t.Helper()
	for _, x := range inside {
		if err := os.MkdirAll(filepath.Join(m.dir, x.outside), 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	if m.fresh {
		configs := os.DirFS(filepath.Join(testenv.ModuleRoot(m.t), "configs"))
		if err := os.CopyFS(filepath.Join(m.dir, "source", "configs"), configs); err != nil {
			m.t.Fatal(err)
		}
		return
	}
	units := os.DirFS(filepath.Join(testenv.ModuleRoot(m.t), "configs", "systemd"))
	programs := os.DirFS(os.Getenv(envPrograms))
	if err := errors.Join(os.CopyFS(filepath.Join(m.dir, "units"), units), os.CopyFS(filepath.Join(m.dir, "bin"), programs)); err != nil {
		m.t.Fatal(err)
	}
	if m.dropIn != "" {
		m.write("units/"+m.unit+".d/test.conf", "[Service]\n"+m.dropIn)
	}
}

// build runs the go command for static programs.
func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), testenv.Tool(t, "go"), args...)
	cmd.Dir = testenv.ModuleRoot(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// write writes a file of the machine's directory.
func (m *machine) write(name, text string) {
	m.t.Helper()
	path := filepath.Join(m.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		m.t.Fatal(err)
	}
}

// start starts the machine's systemd in namespaces and a cgroup of its own.
func (m *machine) start() {
	m.t.Helper()
	group := m.group()
	cgroup, err := os.Open(group)
	if err != nil {
		m.t.Fatal(err)
	}
	defer cgroup.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{initName, m.dir, "--unit=multi-user.target"}
	cmd.Stdout, cmd.Stderr = &m.said, &m.said
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWCGROUP,
		UseCgroupFD: true, CgroupFD: int(cgroup.Fd()),
		Setsid:    true,
		Pdeathsig: syscall.SIGKILL, // of the thread that starts it: no machine outlives the test
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
			close(m.ended)
		}
	}()
	if err := <-started; err != nil {
		m.t.Fatal(err)
	}
	m.pid = cmd.Process.Pid
}

// group makes a cgroup for the machine.
func (m *machine) group() string {
	m.t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		m.t.Fatal(err)
	}
	if len(mounts) == 0 {
		testenv.Need(m.t, "cgroup2", "needs cgroup2")
	}
	group := filepath.Join(mounts[0].Mountpoint, filepath.Base(m.dir))
	if err := os.Mkdir(group, 0o755); err != nil {
		testenv.Need(m.t, "cgroup2", "needs a cgroup of its own: "+err.Error())
	}
	m.t.Cleanup(func() { removeGroup(m.t, group) })
	return group
}

// removeGroup removes a cgroup and those below it, once their processes have ended.
func removeGroup(t *testing.T, group string) {
	below, _ := filepath.Glob(group + "/*/cgroup.procs")
	for _, name := range below {
		removeGroup(t, filepath.Dir(name))
	}
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = os.Remove(group); err == nil || errors.Is(err, os.ErrNotExist) {
			return
		}
	}
	t.Errorf("remove the cgroup: %v", err)
}

// powerOff ends everything of the machine.
func (m *machine) powerOff() {
	if m.t.Failed() {
		journal, _ := m.try("journalctl", "--no-pager", "-o", "short-monotonic")
		status, _ := m.try("systemctl", "--no-pager", "status", m.unit)
		m.t.Logf("the journal:\n%s\n%s\n%s", journal, status, m.said.String())
	}
	_ = syscall.Kill(m.pid, syscall.SIGKILL) // it may have ended
	<-m.ended
}

// path is where the machine's name is to be found from outside.
func (m *machine) path(name string) string { return fmt.Sprintf("/proc/%d/root%s", m.pid, name) }

// try runs a program inside the machine.
func (m *machine) try(args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := &exec.Cmd{
		Path: "/usr/bin/env", Args: append([]string{"env"}, args...), Env: machineEnv, Dir: "/",
		Stdout: &stdout, Stderr: &stderr,
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: what is of the machine ends with its thread
		err := m.join()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	err := <-started
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), err
}

// join takes this thread's children into the machine.
func (m *machine) join() error {
	var fds [2]int
	for i, name := range []string{"pid", "mnt"} {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", m.pid, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // else the other threads would have to come
		return err
	}
	return errors.Join(unix.Setns(fds[0], unix.CLONE_NEWPID), unix.Setns(fds[1], unix.CLONE_NEWNS))
}

// run runs a program of the machine, which must succeed.
func (m *machine) run(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// show returns a property of the unit.
func (m *machine) show(property string) string {
	m.t.Helper()
	return strings.TrimSpace(m.run("systemctl", "show", "-P", property, m.unit))
}

// number is show of a number.
func (m *machine) number(property string) int {
	m.t.Helper()
	n, err := strconv.Atoi(m.show(property))
	if err != nil {
		m.t.Fatalf("%s: %v", property, err)
	}
	return n
}

// await waits until something has come to pass.
func (m *machine) await(what string, done func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-m.ended:
			m.t.Fatalf("waiting for %s, systemd ended: %s", what, m.said.String())
		default:
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("waited too long for %s", what)
		}
	}
}

// serves reports whether the unit is active and its daemon answers.
func (m *machine) serves() bool {
	return m.show("ActiveState") == "active" && m.Health(m.t.Context()) == nil
}
