package services

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/testenv"
)

// patience is how long a server may take to answer or to end.
const patience = 20 * time.Second

// A Process is a server that can be started again at the same address. The test
// fails when it does not answer, with its output.
type Process struct {
	Addr string // host:port, or the path of a socket

	argv   []string
	env    []string // nil: this process's
	ready  func(ctx context.Context) bool
	cmd    *exec.Cmd
	done   chan struct{}
	output testenv.Buffer
}

// launch starts argv and waits until it is ready. It ends with t.
func launch(t testing.TB, addr string, ready func(ctx context.Context) bool, argv ...string) *Process {
	t.Helper()
	return begin(t, &Process{Addr: addr, argv: argv, ready: ready})
}

// begin starts p and waits until it is ready. It ends with t.
func begin(t testing.TB, p *Process) *Process {
	t.Helper()
	t.Cleanup(p.Kill)
	p.Start(t)
	return p
}

// Start starts it, as it has not been or was stopped, and returns when it answers.
func (p *Process) Start(t testing.TB) {
	t.Helper()
	p.Begin(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for !p.ready(ctx) {
		select {
		case <-p.done:
			t.Fatalf("%s ended: %s\n%s", p.argv[0], p.cmd.ProcessState, p.Log())
		case <-ctx.Done():
			t.Fatalf("%s does not answer:\n%s", p.argv[0], p.Log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Begin starts it and does not wait until it answers: it may end before. It returns the process.
func (p *Process) Begin(t testing.TB) (pid int) {
	t.Helper()
	p.cmd = exec.Command(p.argv[0], p.argv[1:]...)
	p.cmd.Env = p.env
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	p.cmd.WaitDelay = time.Second // a helper of it may hold the pipe
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		defer close(done)
		_ = cmd.Wait() // a signal ends it
	}(p.cmd, p.done)
	return p.cmd.Process.Pid
}

// Stop asks it to end and waits; what takes too long is killed.
func (p *Process) Stop() { p.end(syscall.SIGTERM) }

// Kill ends it at once, with all its connections. It may have ended before.
func (p *Process) Kill() { p.end(syscall.SIGKILL) }

func (p *Process) end(s syscall.Signal) {
	if p.cmd == nil || p.cmd.Process == nil {
		return
	}
	// The whole group: what it started goes with it.
	_ = syscall.Kill(-p.cmd.Process.Pid, s)
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
	p.cmd = nil // its number may be another's by now
}

// Log is what it has printed, in all its lives.
func (p *Process) Log() string { return p.output.String() }

// FreeAddr is a loopback address where nobody listens, with a port that connections do not
// get by themselves: a server that is away for a while finds it free again.
func FreeAddr(t testing.TB) string {
	t.Helper()
	const first, last = 20000, 32767 // Linux gives connections those from 32768 on
	// What is started at this moment would have the listener for a moment more.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	var err error
	for range 100 {
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+rand.IntN(last-first+1))); err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatalf("no free port: %v", err)
	return ""
}

// connects is ready when addr takes connections.
func connects(addr string) func(context.Context) bool { return dials("tcp", addr) }

// listens is ready when a unix socket takes connections.
func listens(socket string) func(context.Context) bool { return dials("unix", socket) }

func dials(network, addr string) func(context.Context) bool {
	return func(ctx context.Context) bool {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return false
		}
		c.Close()
		return true
	}
}

// answers is ready when there is any answer at url.
func answers(client *http.Client, url string) func(context.Context) bool {
	return func(ctx context.Context) bool {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return false
		}
		r.Close = true
		resp, err := client.Do(r)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return true
	}
}

// scratch is a directory that any user may enter, for servers that leave root.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "erofsd-service-*")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
