package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

// daemonName is argv[0] of a daemon that a scenario starts. It has to be a process of
// its own: a daemon lets its own reads through.
const daemonName = "erofsd-in-a-scenario"

// IsProcess says that this process is a part of a scenario and not its test; TestMain
// calls [Process] then and nothing else.
func IsProcess(args []string) bool {
	return daemon.IsHelper(args) || daemon.IsGuard(args) || args[0] == readerName || args[0] == daemonName
}

// Process runs such a process and returns its exit code.
func Process(args []string) int {
	switch {
	case daemon.IsHelper(args):
		return daemon.Helper(args, os.Stdout)
	case daemon.IsGuard(args):
		return daemon.Guard(args)
	}
	if args[0] == readerName {
		if err := runReader(args[1], args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if err := runDaemon(args[1], log); err != nil {
		log.Error("ended", "err", err)
		return 1
	}
	return 0
}

// A job is what a daemon's process is told.
type job struct {
	Root, Socket, Transport string
	NoCompletion            bool
	FillTimeout             time.Duration
	Device                  bool // it is descriptor 3
}

func runDaemon(text string, log *slog.Logger) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	o := daemon.Options{
		Root: j.Root, Transport: j.Transport, NoCompletion: j.NoCompletion, FillTimeout: j.FillTimeout, Logger: log,
		Sandbox: daemon.SandboxAuto, // as the product
	}
	if j.Device {
		o.Device, o.Handover = os.NewFile(3, "held device"), true
	}
	c, err := daemon.NewControl(o, j.Socket)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return c.Run(ctx, context.Background(), j.Socket)
}

// A process drives a daemon in a process, on this machine's kernel.
type process struct {
	mounts
	job    job
	row    Row
	disk   string             // that can be filled
	device *cachefiles.Device // that we hold; nil: nobody does
	cmd    *exec.Cmd
	ended  chan struct{} // closed when cmd has
	output testenv.Buffer
}

func newProcess(t testing.TB, r Row, c config, root, socket string) *process {
	t.Helper()
	p := &process{row: r, disk: filepath.Dir(root), job: job{
		Root: root, Socket: socket, Transport: r.Transport, NoCompletion: !c.completion, FillTimeout: c.fillTimeout,
	}}
	if c.held && r.Transport == cachefilesTransport {
		p.hold(t)
	}
	return p
}

// hold opens the device in this process, which keeps it for all daemons.
func (p *process) hold(t testing.TB) {
	t.Helper()
	dir := filepath.Join(p.job.Root, "fscache")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.device, err = cachefiles.Open(""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.device.Close() })
	if err := p.device.Bind(cachefiles.BindOptions{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	p.job.Device = true
}

func (p *process) start(t testing.TB) {
	t.Helper()
	text, err := json.Marshal(p.job)
	if err != nil {
		t.Fatal(err)
	}
	p.output.Reset()
	p.cmd = exec.Command("/proc/self/exe")
	p.cmd.Args = []string{daemonName, string(text)}
	p.cmd.Stderr = &p.output
	p.cmd.WaitDelay = 100 * time.Millisecond // the guard may outlive it and holds the pipe
	if p.device != nil {
		p.cmd.ExtraFiles = []*os.File{p.device.File()}
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		defer close(ended)
		_ = cmd.Wait() // how it ended is in its state
	}(p.cmd, p.ended)
}

func (p *process) failed() error {
	select {
	case <-p.ended:
		return fmt.Errorf("it ended: %s", p.cmd.ProcessState)
	default:
		return nil
	}
}

func (p *process) log() string { return p.output.String() }

func (p *process) stop(t testing.TB) {
	t.Helper()
	p.signal(t, syscall.SIGTERM)
}

func (p *process) kill(t testing.TB) {
	t.Helper()
	p.signal(t, syscall.SIGKILL)
}

// signal ends the daemon by a signal.
func (p *process) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	_ = p.cmd.Process.Signal(s) // it may have ended
	select {
	case <-p.ended:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		t.Errorf("the daemon did not end with %s:\n%s", s, p.log())
	}
}

// killMounting stops the daemon as soon as its helper is there, waits until the helper
// waits for the kernel, which waits for the daemon, and kills the daemon. The helper
// must come to its end. A mount that was done before its helper was seen is undone, and
// tried again.
func (p *process) killMounting(t testing.TB, mount func() error, unmount func()) {
	t.Helper()
	for start := time.Now(); time.Since(start) < patience; unmount() {
		asked := make(chan error, 1)
		go func() { asked <- mount() }()
		if helper := p.awaitHelper(t, asked); helper != 0 {
			p.killServing(t, helper, asked)
			return
		}
	}
	t.Fatalf("no mount helper was seen\n%s", p.log())
}

// awaitHelper returns the daemon's mount helper, 0 when the mount was done without one
// being seen.
func (p *process) awaitHelper(t testing.TB, asked <-chan error) (helper int) {
	t.Helper()
	mounter := childOf(p.cmd.Process.Pid) // it starts the helper
	for {
		select {
		case err := <-asked:
			if err != nil {
				t.Fatalf("%v\n%s", err, p.log())
			}
			return 0
		default:
		}
		if helper = childOf(mounter); helper != 0 {
			return helper
		}
	}
}

// killServing kills the daemon while its helper mounts.
func (p *process) killServing(t testing.TB, helper int, asked <-chan error) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// With fanotify a mount asks for nothing, so it ends; with cachefiles it waits for
	// its OPEN.
	var state byte
	await(t, "the mount to wait", func() bool {
		state = stateOf(helper)
		return state == 'D' || state == 'Z' || state == 0
	})
	t.Logf("the mount helper's state was %q when the daemon was killed", state)
	p.kill(t)
	if err := <-asked; err == nil && state == 'D' {
		t.Error("a daemon that was killed has answered")
	}
	await(t, "the mount helper to end", func() bool { s := stateOf(helper); return s == 'Z' || s == 0 })
}

// childOf returns a child of a process that is a mounter or a mount helper, 0 if there is none.
func childOf(parent int) int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		var state string
		var ppid int
		if _, err := fmt.Sscan(rest, &state, &ppid); err != nil || ppid != parent {
			continue
		}
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !daemon.IsHelper(strings.Split(string(line), "\x00")) {
			continue
		}
		var pid int
		_, _ = fmt.Sscan(filepath.Base(dir), &pid)
		return pid
	}
	return 0
}

// stateOf returns the state of a process, or of the first thread of it that is in an
// uninterruptible sleep; 0 when there is no such process.
func stateOf(pid int) byte {
	var state byte
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if _, rest, ok := strings.Cut(string(text), ") "); err == nil && ok && state != 'D' {
			state = rest[0]
		}
	}
	return state
}

// fill writes a file until there is no room.
func (p *process) fill(t testing.TB) {
	t.Helper()
	f, err := os.Create(filepath.Join(p.disk, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, n := range []int{1 << 20, 4096} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, n))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func (p *process) empty(t testing.TB) {
	t.Helper()
	if err := os.Remove(filepath.Join(p.disk, "ballast")); err != nil {
		t.Fatal(err)
	}
}
