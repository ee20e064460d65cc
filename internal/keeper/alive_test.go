package keeper

import (
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// watched has no pauses worth waiting for either when a worker hangs.
func watched() options {
	o := quick()
	o.Hang = 400 * time.Millisecond
	return o
}

// stopped stops w, which cannot even be told to end then.
func stopped(t *testing.T, w *remote) {
	t.Helper()
	if err := syscall.Kill(w.pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
}

// TestHang: a worker that is stopped, or is silent, is replaced, and its successor has all.
func TestHang(t *testing.T) {
	for how, hang := range map[string]func(t *testing.T, w *remote){
		"stopped": func(t *testing.T, w *remote) {
			w.must(order{Do: "live"})
			w.serve()
			stopped(t, w)
		},
		"silent": func(_ *testing.T, w *remote) {
			w.must(order{Do: "live", N: 3})
			w.serve()
		},
	} {
		t.Run(how, func(t *testing.T) {
			r := newRig(t, watched(), nil)
			first := r.worker()
			hang(t, first)
			r.says("it has given no sign of life for 400ms")
			next := r.worker()
			next.must(order{Do: "live"})
			if next.pid == first.pid {
				t.Error("it is the same process")
			}
			next.serve()
			next.end(0)
			if how == "silent" && !strings.Contains(r.logged(), "goroutine ") {
				t.Error("nothing says where it hung")
			}
		})
	}
}

// TestHangNever: nobody looks for signs of life of a worker that knows none, nor without a
// limit, and one that lives is left alone.
func TestHangNever(t *testing.T) {
	o := watched()
	r := newRig(t, o, nil)
	w := r.worker()
	w.must(order{Do: "entries"})
	w.must(order{Do: "ready"}) // as an older one, without a sign
	time.Sleep(2 * o.Hang)
	w.must(order{Do: "live"})
	time.Sleep(4 * o.Hang)
	w.end(0)
	if strings.Contains(r.logged(), "killed") {
		t.Error("it was killed")
	}

	r = newRig(t, quick(), nil)
	w = r.worker()
	if got := w.do(order{Do: "live"}); got.Err != "none are wanted" {
		t.Errorf("signs of life are wanted without a limit: %q", got.Err)
	}
	w.serve()
	if env := w.must(order{Do: "env"}).Text; strings.Contains(env, envAlive) {
		t.Error("what the keeper says is still in the environment")
	}
	w.end(0)
}

// trace traces pid until done: the thread that has begun it ends with this goroutine.
func trace(pid int, seized chan<- error, done <-chan struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() { // the first thread stays
		defer runtime.UnlockOSThread()
		go trace(pid, seized, done)
		<-done
		return
	}
	seized <- unix.PtraceSeize(pid)
	<-done
}

// TestHangDebugged: who looks into a worker with a debugger may take his time.
func TestHangDebugged(t *testing.T) {
	r := newRig(t, watched(), nil)
	w := r.worker()
	w.must(order{Do: "live", N: 1})
	seized, done := make(chan error), make(chan struct{})
	go trace(w.pid, seized, done)
	letGo := sync.OnceFunc(func() { close(done) })
	defer letGo()
	if err := <-seized; err != nil {
		t.Skipf("cannot trace: %v", err)
	}
	w.serve()
	r.says("a debugger has it")
	if strings.Contains(r.logged(), "worker hangs") {
		t.Error("it was not spared")
	}
	letGo()
	r.says("worker hangs") // from now on it is a worker like any other
	next := r.worker()
	next.serve()
	next.end(0)
}

// TestHangUpgraded: the keeper that has become another one watches on.
func TestHangUpgraded(t *testing.T) {
	r := newRig(t, watched(), nil)
	w := r.worker()
	w.must(order{Do: "live"})
	w.serve()
	w.send(order{Do: "upgrade", Path: r.script("second", "")})
	next := r.worker()
	next.must(order{Do: "live"})
	next.send(order{Do: "entries"})
	if got := w.receive(); got.Err != "" {
		t.Fatalf("upgrade: %s", got.Err)
	}
	w.must(order{Do: "yield"})
	w.send(order{Do: "exit"})
	next.receive()
	next.must(order{Do: "ready"})
	r.says("keeper is the new executable")
	stopped(t, next)
	last := r.worker()
	last.must(order{Do: "live"})
	last.serve()
	last.end(0)
}

// A look that comes late counts once, however late, so a machine that stood still does not
// look like a worker that hangs.
func TestLooksAreCounted(t *testing.T) {
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	k, w := &keeper{}, &worker{process: self, ready: true}
	w.watch.every = time.Second
	k.alive(w)
	var missed []int
	for range 3 {
		k.look(w, w.lookAt().Add(time.Hour))
		missed = append(missed, w.watch.missed)
	}
	if want := []int{0, 1, 2}; !slices.Equal(missed, want) {
		t.Errorf("missed %v, want %v", missed, want)
	}
}
