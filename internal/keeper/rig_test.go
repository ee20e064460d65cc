package keeper

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// The test binary is also the keeper and the worker, as envRole says.
const (
	envRole    = "KEEPER_TEST_ROLE"
	envControl = "KEEPER_TEST_CONTROL" // socket on which a worker takes orders
	envOptions = "KEEPER_TEST_OPTIONS"
	envVersion = "KEEPER_TEST_VERSION"
	envBuild   = "KEEPER_TEST_BUILD" // set by scripts that stand for another executable
)

// patience is how long a test waits for what must come.
const patience = 60 * time.Second

func TestMain(m *testing.M) {
	switch os.Getenv(envRole) {
	case "keeper":
		os.Exit(keeperMain())
	case "worker":
		os.Exit(workerMain())
	}
	testenv.Main(m)
}

// A rig is a keeper process and the socket where its workers take orders.
type rig struct {
	t       *testing.T
	dir     string
	control *net.UnixListener
	cmd     *exec.Cmd
	log     string
	ended   chan struct{}
}

// newRig starts a keeper; env is added to its environment, files are its descriptors from 3.
func newRig(t *testing.T, o options, env []string, files ...*os.File) *rig {
	t.Helper()
	dir := t.TempDir()
	control, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "control"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, control: control, log: filepath.Join(dir, "log"), ended: make(chan struct{})}
	log, err := os.Create(r.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for _, d := range []*time.Duration{&o.Ready, &o.Hello, &o.Yield} {
		if *d == 0 {
			*d = patience // a busy machine is no failure
		}
	}
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	r.cmd = exec.Command("/proc/self/exe")
	r.cmd.Stdout, r.cmd.Stderr, r.cmd.ExtraFiles = log, log, files
	r.cmd.Env = append(os.Environ(), envRole+"=keeper", envControl+"="+control.Addr().String(), envOptions+"="+string(text), envVersion+"="+o.Version)
	r.cmd.Env = append(r.cmd.Env, env...)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.cmd.Wait(); close(r.ended) }()
	t.Cleanup(func() {
		control.Close()
		r.cmd.Process.Kill()
		<-r.ended
		if t.Failed() {
			t.Logf("the keeper's log:\n%s", r.logged())
		}
	})
	return r
}

func (r *rig) logged() string {
	text, _ := os.ReadFile(r.log)
	return string(text)
}

// code waits for the keeper's end.
func (r *rig) code() int {
	r.t.Helper()
	select {
	case <-r.ended:
	case <-time.After(patience):
		r.t.Fatal("the keeper does not end")
	}
	return exitCode(r.cmd.ProcessState)
}

// signal signals the keeper.
func (r *rig) signal(s syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.t.Fatal(err)
	}
}

// fds describes the keeper's descriptors that are none of the runtime's.
func (r *rig) fds() []string {
	r.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", r.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		r.t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && !strings.HasPrefix(target, "anon_inode:[event") {
			kind, _, _ := strings.Cut(target, ":[") // sockets have numbers
			list = append(list, kind)
		}
	}
	slices.Sort(list)
	return list
}

// eventually waits for a condition.
func (r *rig) eventually(what string, f func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("never: %s", what)
		}
	}
}

// says waits for the keeper's log to say text.
func (r *rig) says(text string) {
	r.t.Helper()
	r.eventually("the log says "+text, func() bool { return strings.Contains(r.logged(), text) })
}

// A remote is a worker as the test sees it.
type remote struct {
	rig     *rig
	conn    net.Conn
	reports *bufio.Scanner
	pid     int
	build   string
}

// worker waits for the next worker to start.
func (r *rig) worker() *remote {
	r.t.Helper()
	if err := r.control.SetDeadline(time.Now().Add(patience)); err != nil {
		r.t.Fatal(err)
	}
	conn, err := r.control.Accept()
	if err != nil {
		r.t.Fatalf("no worker starts: %v", err)
	}
	r.t.Cleanup(func() { conn.Close() })
	w := &remote{rig: r, conn: conn, reports: bufio.NewScanner(conn)}
	w.reports.Buffer(nil, 16<<20)
	hello := w.do(order{Do: "hello"})
	w.pid, w.build = hello.PID, hello.Build
	return w
}

// send gives an order without waiting for its report.
func (w *remote) send(o order) {
	w.rig.t.Helper()
	if err := json.NewEncoder(w.conn).Encode(o); err != nil {
		w.rig.t.Fatal(err)
	}
}

func (w *remote) receive() report {
	w.rig.t.Helper()
	w.conn.SetReadDeadline(time.Now().Add(patience))
	var r report
	if !w.reports.Scan() {
		w.rig.t.Fatalf("worker %d does not report: %v", w.pid, w.reports.Err())
	}
	if err := json.Unmarshal(w.reports.Bytes(), &r); err != nil {
		w.rig.t.Fatal(err)
	}
	return r
}

func (w *remote) do(o order) report {
	w.rig.t.Helper()
	w.send(o)
	return w.receive()
}

// must does what must not fail.
func (w *remote) must(o order) report {
	w.rig.t.Helper()
	r := w.do(o)
	if r.Err != "" {
		w.rig.t.Fatalf("worker %d: %s: %s", w.pid, o.Do, r.Err)
	}
	return r
}

// serve makes it ready, and returns what it was given.
func (w *remote) serve() []held {
	w.rig.t.Helper()
	list := w.must(order{Do: "entries"}).Entries
	w.must(order{Do: "ready"})
	return list
}

// end has it end in order with a code.
func (w *remote) end(code int) {
	w.rig.t.Helper()
	w.must(order{Do: "end"})
	w.send(order{Do: "exit", N: code})
	if got := w.rig.code(); got != code {
		w.rig.t.Errorf("the keeper ended with %d, want the worker's %d", got, code)
	}
}

// file makes a file to be put.
func (r *rig) file(name string) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, []byte(strings.Repeat(name, 100)), 0o600); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// script makes an executable that is this one, of another build.
func (r *rig) script(name, env string) string {
	r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	return r.executable(name, fmt.Sprintf("%s=%s %s exec '%s' \"$@\"", envBuild, name, env, self))
}

func (r *rig) executable(name, text string) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// alive reports whether a process runs.
func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

// setLimit lets a process have only so many descriptors.
func setLimit(t *testing.T, pid int, n uint64) {
	t.Helper()
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n}, nil); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
