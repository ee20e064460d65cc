package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/connectivity"

	"github.com/erofsd/erofsd/internal/api"
)

// configure changes the rig's configuration.
func (r *rig) configure(t *testing.T, daemon string) {
	t.Helper()
	text, err := os.ReadFile(r.config)
	if err == nil {
		err = os.WriteFile(r.config, []byte(strings.Replace(string(text), "[daemon]\n", "[daemon]\n"+daemon+"\n", 1)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// other waits until another worker than that answers, and returns it with its keeper.
func (r *rig) other(t *testing.T, than int) (worker, keeper int) {
	t.Helper()
	eventually(t, r, "another daemon answers", func() bool {
		worker, keeper = r.daemon(t)
		return worker != than && keeper > 1
	})
	return worker, keeper
}

func eventually(t *testing.T, r *rig, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patienceOfTest); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s; the log:\n%s", what, r.log.String())
		}
	}
}

func killAll(t *testing.T, signal syscall.Signal, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
}

// stored reports whether the service manager keeps what erofsd holds.
func (r *rig) stored(t *testing.T) bool {
	return slices.ContainsFunc(r.manager.Kept(t), func(name string) bool { return strings.HasPrefix(name, "k-log-") })
}

const tookOver = "keeper takes over what the service manager kept"

// took waits until keepers have so often begun with what was kept.
func (r *rig) took(t *testing.T, times int) {
	t.Helper()
	eventually(t, r, "another keeper has what was kept", func() bool { return strings.Count(r.log.String(), tookOver) == times })
}

// TestFailover kills and stops keepers and workers, also while there is no snapshotter: each
// time another daemon goes on with what was held.
func TestFailover(t *testing.T) {
	r := newRig(t)
	r.configure(t, `watchdog = "3s"`)
	r.start(t)
	worker, keeper := r.daemon(t)
	eventually(t, r, "what is held is stored", func() bool { return r.stored(t) })
	eventually(t, r, "the snapshotter has seen it", func() bool { return strings.Contains(r.log.String(), "erofsd answers") })

	killAll(t, syscall.SIGKILL, keeper, worker)
	worker, keeper = r.other(t, worker)
	r.took(t, 1)

	killAll(t, syscall.SIGKILL, keeper) // its worker lives, and has to go
	worker, keeper = r.other(t, worker)
	r.took(t, 2)

	killAll(t, syscall.SIGSTOP, keeper)
	worker, keeper = r.other(t, worker)
	r.took(t, 3)

	r.stop(t, syscall.SIGKILL)
	killAll(t, syscall.SIGKILL, keeper, worker)
	r.start(t)
	worker, keeper = r.other(t, worker)
	r.took(t, 4)

	r.stop(t, syscall.SIGTERM) // it notices what happens to a daemon that it did not start
	r.start(t)
	if same, _ := r.daemon(t); same != worker {
		t.Errorf("the daemon was %d and is %d after a restart of the snapshotter", worker, same)
	}
	killAll(t, syscall.SIGKILL, keeper)
	worker, keeper = r.other(t, worker)
	r.took(t, 5)

	// A service manager that lets go of everything: the daemon stores it again.
	r.stop(t, syscall.SIGKILL)
	r.manager.Drop(t)
	r.start(t)
	eventually(t, r, "all is stored again", func() bool { return r.stored(t) })
	killAll(t, syscall.SIGKILL, keeper, worker)
	r.other(t, worker)
	r.took(t, 6)
}

// TestRecoverRestart starts another daemon, with nothing of the last one's.
func TestRecoverRestart(t *testing.T) {
	r := newRig(t)
	r.configure(t, `recover_policy = "restart"`)
	r.start(t)
	worker, keeper := r.daemon(t)
	killAll(t, syscall.SIGKILL, keeper, worker)
	r.other(t, worker)
	if r.stored(t) || strings.Contains(r.log.String(), tookOver) {
		t.Errorf("something was kept: %q; the log:\n%s", r.manager.Kept(t), r.log.String())
	}
}

// TestRecoverNone does not start another daemon, and says so at once to who wants one; the
// next snapshotter starts one.
func TestRecoverNone(t *testing.T) {
	r := newRig(t)
	r.configure(t, `recover_policy = "none"`)
	r.start(t)
	worker, keeper := r.daemon(t)
	eventually(t, r, "the snapshotter has seen it", func() bool { return strings.Contains(r.log.String(), "erofsd answers") })
	killAll(t, syscall.SIGKILL, keeper, worker)
	eventually(t, r, "it is said that there is none", func() bool { return strings.Contains(r.log.String(), "it is not started again") })
	d := newDaemon(daemonConfig{Socket: r.dir + "/run/erofsd.sock"}, nil, nil)
	defer d.close()
	if v, err := d.Version(t.Context()); err == nil {
		t.Errorf("process %d answers", v.PID)
	}
	r.stop(t, syscall.SIGTERM)
	r.start(t)
	r.other(t, worker)
}

// TestNotAgain fails whoever wants a daemon that is not started any more, without a wait.
func TestNotAgain(t *testing.T) {
	d := newDaemon(daemonConfig{Socket: "/nowhere"}, nil, nil)
	defer d.close()
	d.over = errNotAgain
	if err := d.BindImage(t.Context(), api.BindRequest{}); !errors.Is(err, errNotAgain) {
		t.Errorf("an image is bound: %v", err)
	}
}

// TestSocketActivation has the service manager listen for containerd: a call that is made
// while there is no snapshotter waits for the next one, and does not fail.
func TestSocketActivation(t *testing.T) {
	r := newRig(t)
	address := filepath.Join(r.dir, "run", "grpc.sock")
	if err := os.Mkdir(filepath.Dir(address), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err = errors.Join(err, l.Close()); err != nil {
		t.Fatal(err)
	}
	r.manager.Keep(t, "containerd-erofsd-grpc.socket", f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	conn := r.dial(t)
	sn := onConn(conn)
	called := make(chan error, 1)
	for i, end := range []syscall.Signal{0, syscall.SIGTERM, syscall.SIGKILL} {
		if end != 0 {
			r.stop(t, end)
			// A call through a connection whose end the client has not seen yet fails.
			for conn.GetState() == connectivity.Ready && conn.WaitForStateChange(t.Context(), connectivity.Ready) {
			}
		}
		go func() {
			_, err := sn.Prepare(t.Context(), fmt.Sprint("call-", i), "")
			called <- err
		}()
		select {
		case err := <-called:
			t.Fatalf("a call without a snapshotter: %v", err)
		case <-time.After(100 * time.Millisecond): // it has begun, or begins later
		}
		r.start(t)
		if err := <-called; err != nil {
			t.Errorf("the call that waited after %v: %v", end, err)
		}
	}
	r.daemon(t) // one that does not answer yet would not be ended
}

// TestAnother has nydusd at the daemon's socket, or anything else that is not erofsd.
func TestAnother(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	other := &http.Server{Handler: http.NotFoundHandler()}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = other.Serve(l) // until it is closed
	}()
	defer func() {
		if err := other.Close(); err != nil {
			t.Error(err)
		}
		<-served
	}()
	d := newDaemon(daemonConfig{Mode: modeConnect, Socket: socket}, nil, nil)
	defer d.close()
	if _, err := d.identify(t.Context()); err == nil || !strings.Contains(err.Error(), "not erofsd") {
		t.Errorf("error %v", err)
	}
}

// TestLetGo gives up what the last daemon held when nothing can be started with it for long;
// not before.
func TestLetGo(t *testing.T) {
	c := daemonConfig{Mode: modeStart, Socket: filepath.Join(t.TempDir(), "erofsd.sock"), RecoverPolicy: recoverFailover}
	d := newDaemon(c, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	if err := d.open(t.Context(), nil, nil); err != nil {
		t.Fatal(err)
	}
	defer d.close()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(filepath.Dir(c.Socket), "client"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	to := &net.UnixAddr{Name: filepath.Join(filepath.Dir(c.Socket), storeName), Net: "unixgram"}
	if _, _, err := conn.WriteMsgUnix([]byte("FDSTORE=1\nFDNAME=x\n"), syscall.UnixRights(syscall.Stdin), to); err != nil {
		t.Fatal(err)
	}
	if err := d.store.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	now, cancel := context.WithCancel(t.Context())
	cancel() // miss does not wait
	lost := func() error { t.Error("images are given up"); return nil }
	long := time.Now().Add(-2 * heldTime)
	for _, s := range []struct {
		starts int
		silent time.Time
		held   int
	}{{heldStarts, long, 1}, {heldStarts + 1, time.Now().Add(-heldTime / 2), 1}, {heldStarts + 1, long, 0}} {
		d.starts = s.starts
		d.miss(now, &vigil{silent: s.silent}, errors.New("it ended"), lost)
		if n := d.held(); n != s.held {
			t.Errorf("after %d starts and since %v %d are held, want %d", s.starts, s.silent, n, s.held)
		}
	}
}
