package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// patienceOfTest is how long a process may take for anything.
const patienceOfTest = 60 * time.Second

// TestProcessWait sees the end of a process, and leaves when its caller does.
func TestProcessWait(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := openProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.wait(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("wait of somebody who left: %v", err)
	}
	other, err := openProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer other.close()
	ended := make(chan error, 1)
	go func() { ended <- other.wait(context.Background()) }()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("wait: %v", err)
	}
	_ = cmd.Wait() // it was killed
	if _, err := openProcess(cmd.Process.Pid); err == nil {
		t.Error("a process that has ended was opened")
	}
}

// A rig is the program with its daemon, in a directory of their own.
type rig struct {
	dir, bin, config string
	cmd              *exec.Cmd
	ended            chan struct{}
	log              testenv.Buffer
	manager          *testenv.Manager
	starts           int
}

func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.Root(t)
	dir, err := os.MkdirTemp("", "erofsd-snapshotter-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	r := &rig{dir: dir, bin: filepath.Join(dir, "bin"), config: filepath.Join(dir, "config.toml")}
	build := exec.Command("go", "build", "-o", r.bin+"/", "./cmd/containerd-erofsd-grpc", "./cmd/erofsd")
	build.Dir = testenv.ModuleRoot(t)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	text := strings.NewReplacer("DIR", dir).Replace(`
root = "DIR/root"
address = "DIR/run/grpc.sock"
[daemon]
socket = "DIR/run/erofsd.sock"
root = "DIR/cache"
args = ["--rlimit-nofile", "0"]
[containerd]
address = ""
[system]
address = "DIR/run/system.sock"
[metrics]
address = "127.0.0.1:0"
`)
	if err := os.WriteFile(r.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r.manager = testenv.NewManager(t)
	t.Cleanup(func() { r.end(t) })
	return r
}

// start starts the program and waits until it says that it is ready.
func (r *rig) start(t *testing.T) {
	t.Helper()
	r.cmd = exec.Command(filepath.Join(r.bin, "containerd-erofsd-grpc"), "--config", r.config)
	r.cmd.Stderr = &r.log
	r.cmd.WaitDelay = time.Millisecond // the daemon has the pipe too
	give := r.manager.Give(t, r.cmd)
	err := r.cmd.Start()
	give()
	if err != nil {
		t.Fatal(err)
	}
	r.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		defer close(ended)
		_ = cmd.Wait() // how it ended is in its state
	}(r.cmd, r.ended)
	r.starts++
	r.manager.Await(t, "READY=1", r.starts)
}

// stop ends the program by a signal and waits.
func (r *rig) stop(t *testing.T, s os.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.ended:
	case <-time.After(patienceOfTest):
		_ = r.cmd.Process.Signal(syscall.SIGQUIT) // it says what it waits for
		<-r.ended
		t.Fatalf("it does not end; the log:\n%s", r.log.String())
	}
}

// daemon returns the daemon's worker, when it answers, and its keeper.
func (r *rig) daemon(t *testing.T) (worker, keeper int) {
	t.Helper()
	client := api.NewClient(filepath.Join(r.dir, "run", "erofsd.sock"))
	defer client.Close()
	for end := time.Now().Add(patienceOfTest); ; time.Sleep(10 * time.Millisecond) {
		v, err := client.Version(t.Context())
		if err == nil {
			return v.PID, keeperOf(t, v.PID)
		}
		if time.Now().After(end) {
			t.Fatalf("no daemon answers: %v; the log:\n%s", err, r.log.String())
		}
	}
}

// keeperOf is the parent of a process.
func keeperOf(t *testing.T, pid int) int {
	t.Helper()
	parent, err := parentOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	return parent
}

// end ends everything.
func (r *rig) end(t *testing.T) {
	if r.cmd == nil {
		return
	}
	select {
	case <-r.ended:
	default:
		r.stop(t, syscall.SIGTERM)
	}
	client := api.NewClient(filepath.Join(r.dir, "run", "erofsd.sock"))
	defer client.Close()
	v, err := client.Version(context.Background())
	if err != nil {
		return
	}
	keeper := keeperOf(t, v.PID)
	if keeper <= 1 {
		keeper = v.PID
	}
	p, err := openProcess(keeper)
	if err == nil {
		err = errors.Join(syscall.Kill(keeper, syscall.SIGTERM), p.wait(context.Background()))
		p.close()
	}
	if err != nil {
		t.Error(err)
	}
	r.gone(t)
}

// gone waits until no process has anything of the rig, and nothing is mounted there.
func (r *rig) gone(t *testing.T) {
	t.Helper()
	eventually(t, r, "all processes have ended", func() bool { return len(r.processes(t)) == 0 })
	if mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(r.dir)); err != nil || len(mounts) > 0 {
		t.Errorf("%d mounts are left: %v", len(mounts), err)
	}
}

// processes are those that have the rig in their command line, by the name of their program.
func (r *rig) processes(t *testing.T) map[string][]int {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	list := map[string][]int{}
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(line), r.dir+"/") {
			continue // it has ended, or is somebody else's
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			t.Fatal(err)
		}
		program, _, _ := strings.Cut(string(line), "\x00")
		list[filepath.Base(program)] = append(list[filepath.Base(program)], pid)
	}
	return list
}

// snapshots is a client as containerd has it.
func (r *rig) snapshots(t *testing.T) snapshots.Snapshotter {
	t.Helper()
	return onConn(r.dial(t))
}

// dial is what containerd speaks to the snapshotter through.
func (r *rig) dial(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+filepath.Join(r.dir, "run", "grpc.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func onConn(conn *grpc.ClientConn) snapshots.Snapshotter {
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "erofsd")
}

// TestService serves at once, by sockets that only root has; a second one is refused; the
// daemon is started, started again after its death, and outlives the program.
func TestService(t *testing.T) {
	r := newRig(t)
	r.start(t)
	sn := r.snapshots(t)
	if _, err := sn.Prepare(t.Context(), "a", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := sn.Prepare(t.Context(), "a", ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same again: %v", err)
	}
	for name, want := range map[string]os.FileMode{"run": 0o700, "run/grpc.sock": 0o600, "root": 0o700} {
		st, err := os.Stat(filepath.Join(r.dir, name))
		if err != nil || st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, %v; want %o", name, st.Mode(), err, want)
		}
	}
	worker, keeper := r.daemon(t)
	if status, body := get(t, "unix", filepath.Join(r.dir, "run", "system.sock"), "/api/v1/daemons"); status != 200 || !strings.Contains(body, strconv.Itoa(worker)) {
		t.Errorf("the system API: %d %s; want process %d", status, body, worker)
	}
	second := exec.Command(filepath.Join(r.bin, "containerd-erofsd-grpc"), "--config", r.config)
	if out, err := second.CombinedOutput(); err == nil || !strings.Contains(string(out), "another") {
		t.Errorf("a second one: %v\n%s", err, out)
	}

	for _, pid := range []int{keeper, worker} {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	next, _ := r.daemon(t)
	if next == worker {
		t.Errorf("process %d answers after its death", worker)
	}
	r.stop(t, syscall.SIGTERM)
	if code := r.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("it ended with %d; the log:\n%s", code, r.log.String())
	}
	if same, _ := r.daemon(t); same != next {
		t.Errorf("the daemon was %d and is %d after the program's end", next, same)
	}
	r.start(t)
	if info, err := sn.Stat(t.Context(), "a"); err != nil || info.Kind != snapshots.KindActive {
		t.Errorf("after a restart the snapshot is %+v, %v", info, err)
	}
	r.stop(t, syscall.SIGKILL)
	r.start(t) // over the socket that is left
	if same, _ := r.daemon(t); same != next {
		t.Errorf("the daemon was %d and is %d after a kill of the program", next, same)
	}
}
