package power

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

// daemonName is argv[0] of the daemon, which is a process of its own: one lets its own
// reads through.
const daemonName = "erofsd-below-power-cuts"

func TestMain(m *testing.M) {
	switch {
	case daemon.IsHelper(os.Args):
		os.Exit(daemon.Helper(os.Args, os.Stdout))
	case daemon.IsGuard(os.Args):
		os.Exit(daemon.Guard(os.Args))
	case os.Args[0] == daemonName:
		os.Exit(runDaemon(os.Args[1], os.Args[2]))
	}
	testenv.Main(m)
}

// runDaemon is what cmd/erofsd does once it knows its options.
func runDaemon(options, socket string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	o := daemon.Options{Logger: log}
	err := json.Unmarshal([]byte(options), &o)
	if err == nil {
		err = serve(o, socket)
	}
	if err != nil {
		log.Error("ended", "err", err)
		return 1
	}
	return 0
}

func serve(o daemon.Options, socket string) error {
	c, err := daemon.NewControl(o, socket)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return c.Run(ctx, context.Background(), socket)
}

// A process is a daemon. It ends with its test, with all its images unmounted.
type process struct {
	*api.Client
	cmd    *exec.Cmd
	ended  chan struct{} // closed when cmd has
	output testenv.Buffer
}

// startDaemon starts a daemon with a used or an empty root.
func startDaemon(t *testing.T, o daemon.Options) *process {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "power-*") // a short name: a socket lies there
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "sock")
	p := &process{Client: api.NewClient(socket), cmd: exec.Command("/proc/self/exe"), ended: make(chan struct{})}
	p.cmd.Args = []string{daemonName, string(text), socket}
	p.cmd.Stderr = &p.output
	p.cmd.WaitDelay = 100 * time.Millisecond // the guard may outlive it and holds the pipe
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // how it ended is in its state
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			s := p.output.String()
			t.Logf("the daemon's log:\n%s", s[max(0, len(s)-4000):])
		}
	})
	await(t, "the daemon to answer", func() bool {
		if p.hasEnded() {
			t.Fatalf("the daemon does not start: %s", p.cmd.ProcessState)
		}
		_, err := p.Status(t.Context())
		return err == nil
	})
	return p
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// stop unmounts what is mounted and ends the daemon in order. Twice is once.
func (p *process) stop(t *testing.T) {
	t.Helper()
	if p.hasEnded() {
		return
	}
	ctx := context.Background() // also when the test has ended
	if st, err := p.Status(ctx); err != nil {
		t.Error(err)
	} else {
		for _, m := range st.Images {
			if m.Detached {
				continue
			}
			if err := p.Unmount(ctx, api.UnmountRequest{Mountpoint: m.Mountpoint}); err != nil {
				t.Error(err)
			}
		}
	}
	_ = p.Close() // idle connections
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		t.Errorf("the daemon does not end")
		<-p.ended
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the daemon ended with %s", p.cmd.ProcessState)
	}
}
