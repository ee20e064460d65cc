package smoke

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

// patience is how long anything may take that has no limit of its own. A guest's
// processors are emulated.
const patience = 30 * time.Second

// A row is one way to a kernel.
type row struct {
	name   string // as internal/daemon calls it
	images *images
}

// need skips t, or fails it where the row must run, unless this kernel has it.
func (r row) need(t *testing.T) {
	t.Helper()
	testenv.Root(t)
	dir := scratch(t)
	if r.name == daemon.Cachefiles {
		testenv.Kernel(t, "cachefiles", cachefiles.Supported("", dir))
		return
	}
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
}

// scratch returns a new directory on a file system that can hold a cache, with a short
// name: sockets lie there.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("EROFSD_TEST_DIR"), "smoke-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A machine is where daemons run, one after the other or, in an upgrade, two, and who
// asks them: directories that outlive a daemon.
type machine struct {
	row     row
	dir     string
	fscache string // the kernel's cache, made by who starts the daemon, as nydus-snapshotter does
	root    string
}

func newMachine(t *testing.T, r row) *machine {
	t.Helper()
	dir := scratch(t)
	m := &machine{row: r, dir: dir, fscache: filepath.Join(dir, "cache"), root: filepath.Join(dir, "root")}
	for _, d := range []string{m.fscache, m.root} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// job is what the machine's daemon is told: as by erofsd singleton --fscache --apisock.
func (m *machine) job() job {
	j := job{
		Options: daemon.Options{Root: m.root, Transport: m.row.name, FillTimeout: 20 * time.Second},
		Socket:  filepath.Join(m.dir, "api.sock"),
	}
	if m.row.name == daemon.Cachefiles {
		j.Options.Fscache, j.Options.Hasty = m.fscache, true
	}
	return j
}

// A process is a daemon that was started. It ends with its test.
type process struct {
	*client
	t       *testing.T
	row     row
	cmd     *exec.Cmd
	ended   chan struct{}
	output  testenv.Buffer
	figures *json.Decoder
	alive   net.Conn // that nydus-snapshotter keeps open
}

// start starts a daemon as j says and waits until its API answers.
func (m *machine) start(t *testing.T, j job) *process {
	t.Helper()
	p := m.launch(t, j)
	await(t, "the API to answer", func() bool {
		if p.hasEnded() {
			t.Fatalf("the daemon ended: %s\n%s", p.cmd.ProcessState, p.log())
		}
		_, _, err := p.do("GET", "/api/v1/daemon", nil)
		return err == nil
	})
	p.connect()
	return p
}

// connect opens the connection that is there as long as the daemon is.
func (p *process) connect() {
	p.t.Helper()
	var err error
	if p.alive, err = net.Dial("unix", p.socket); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { p.alive.Close() })
}

// launch starts a daemon.
func (m *machine) launch(t *testing.T, j job) *process {
	t.Helper()
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	return m.begin(t, j.Socket, []string{daemonName, string(text)})
}

// begin starts this program as args say.
func (m *machine) begin(t *testing.T, socket string, args []string) *process {
	t.Helper()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	p := &process{
		client: newClient(t, socket), t: t, row: m.row, ended: make(chan struct{}), figures: json.NewDecoder(in),
		cmd: exec.Command("/proc/self/exe"),
	}
	p.cmd.Args = args
	p.cmd.Stderr = &p.output
	p.cmd.ExtraFiles = []*os.File{out}
	p.cmd.WaitDelay = 100 * time.Millisecond // the guard may outlive it and holds the pipe
	err = p.cmd.Start()
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // how it ended is in its state
	}()
	t.Cleanup(p.cleanup)
	return p
}

// cleanup ends the daemon, which nobody needs any more.
func (p *process) cleanup() {
	if !p.hasEnded() {
		p.signal(syscall.SIGTERM)
	}
	if s := p.log(); p.t.Failed() || strings.Contains(s, "panic:") || strings.Contains(s, "DATA RACE") {
		p.t.Errorf("the daemon's log:\n%s", s[max(0, len(s)-8000):])
	}
}

func (p *process) log() string { return p.output.String() }

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// signal ends the daemon by a signal.
func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	_ = p.cmd.Process.Signal(s) // it may have ended
	p.awaitEnd()
}

func (p *process) awaitEnd() {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		p.t.Fatalf("the daemon does not end\n%s", p.log())
	}
}

// stop ends it in order: with exit code 0, and its socket is gone.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	p.checkEnd()
}

func (p *process) checkEnd() {
	p.t.Helper()
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Errorf("it ended with %s, want code 0\n%s", p.cmd.ProcessState, p.log())
	}
	if _, err := os.Lstat(p.socket); err == nil {
		p.t.Error("its socket is still there")
	}
}

// checkAlive checks that the connection that was idle all the time is open still.
func (p *process) checkAlive() {
	p.t.Helper()
	if err := p.alive.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		p.t.Fatal(err)
	}
	n, err := p.alive.Read(make([]byte, 1))
	if !os.IsTimeout(err) {
		p.t.Errorf("the idle connection: %d bytes, %v; a snapshotter takes that for the daemon's death", n, err)
	}
}

// checkHungUp checks that the idle connection ended with the daemon.
func (p *process) checkHungUp() {
	p.t.Helper()
	if err := p.alive.SetReadDeadline(time.Now().Add(patience)); err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.alive.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		p.t.Errorf("the idle connection after the daemon's death: %v", err)
	}
}

// use is what the daemon takes.
type use struct {
	goroutines, files int
	heap, rss         int64 // bytes
}

func (u use) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, heap %.1f MiB, RSS %.1f MiB",
		u.goroutines, u.files, float64(u.heap)/(1<<20), float64(u.rss)/(1<<20))
}

// use asks the daemon, after it gave back what it could. Connections that are idle count
// for nobody.
func (p *process) use() (u use) {
	p.t.Helper()
	p.http.CloseIdleConnections()
	p.own.Close()
	if err := p.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		p.t.Fatal(err)
	}
	var f figures
	if err := p.figures.Decode(&f); err != nil {
		p.t.Fatal(err)
	}
	proc := filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid))
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		p.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(proc, "statm"))
	if err != nil {
		p.t.Fatal(err)
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(text), &size, &resident); err != nil {
		p.t.Fatal(err)
	}
	return use{f.Goroutines, len(files), f.Heap, resident * int64(os.Getpagesize())}
}

// await polls until ok.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited too long for: %s", what)
		}
	}
}
