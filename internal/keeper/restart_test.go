package keeper

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// quick has no pauses worth waiting for.
func quick() options {
	return options{Backoff: Backoff{Min: time.Millisecond, Max: 10 * time.Millisecond}}
}

func TestRestart(t *testing.T) {
	for _, c := range []struct {
		how   string
		order order
	}{
		{"signal: killed", order{Do: "die", N: int(syscall.SIGKILL)}},
		{"signal: user defined signal 1", order{Do: "die", N: int(syscall.SIGUSR1)}},
		{"exit status 3", order{Do: "exit", N: 3}},
		{"exit status 0", order{Do: "exit"}},
		{"exit status 2", order{Do: "panic"}},
	} {
		t.Run(c.how, func(t *testing.T) {
			r := newRig(t, quick(), nil)
			w := r.worker()
			if list := w.serve(); len(list) != 0 {
				t.Errorf("the first worker was given %v", list)
			}
			w.must(order{Do: "put", Name: "group", Data: "of events", Path: r.file("group"), N: 17})
			w.must(order{Do: "put", Name: "text", Data: "alone"})
			w.must(order{Do: "put", Name: "gone", Path: r.file("gone")})
			w.must(order{Do: "put", Name: "file", Path: r.file("file"), N: 3})
			w.must(order{Do: "drop", Name: "gone"})
			w.send(c.order)

			next := r.worker()
			want := []held{
				{"group", "of events", r.dir + "/group", 17},
				{"text", "alone", "", 0},
				{"file", "", r.dir + "/file", 3},
			}
			if list := next.serve(); !slices.Equal(list, want) {
				t.Errorf("the successor was given\n%v, want\n%v", list, want)
			}
			if next.pid == w.pid {
				t.Error("it is the same process")
			}
			r.says(fmt.Sprintf("pid=%d how=%q", w.pid, c.how))
			next.end(0)
		})
	}
}

// TestRestartAgain kills one worker after the other, each with what its predecessors put.
func TestRestartAgain(t *testing.T) {
	r := newRig(t, quick(), nil)
	path := r.file("f")
	for i := range 10 {
		w := r.worker()
		if list := w.serve(); len(list) != i {
			t.Fatalf("worker %d was given %d entries: %v", i, len(list), list)
		}
		w.must(order{Do: "put", Name: fmt.Sprint(i), Path: path, N: i})
		w.send(order{Do: "die", N: int(syscall.SIGKILL)})
	}
	r.worker().serve()
}

func TestJournal(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	if got := w.do(order{Do: "journal"}); got.Err != "none" {
		t.Errorf("the first worker has a journal: %q", got.Err)
	}
	w.serve()
	w.must(order{Do: "put", Name: "journal", Path: r.file("journal"), N: 5})
	w.send(order{Do: "exit", N: 1})

	w = r.worker()
	w.must(order{Do: "journal", Data: "written before anything"})
	want := held{"journal", "", r.dir + "/journal", int64(5 + len("written before anything"))}
	if list := w.serve(); len(list) != 1 || list[0] != want {
		t.Errorf("was given %v, want %v", list, want)
	}
	if fds := w.must(order{Do: "env"}).Text; strings.Contains(fds, envSocket+"=") {
		t.Error("what says that there is a keeper is still in the environment")
	}
}

// TestNotServed is a worker that never was ready: it ends as it would without a keeper.
func TestNotServed(t *testing.T) {
	for _, code := range []int{0, 1, 2, 77} {
		r := newRig(t, quick(), nil)
		w := r.worker()
		w.must(order{Do: "entries"})
		w.send(order{Do: "exit", N: code})
		if got := r.code(); got != code {
			t.Errorf("the keeper ended with %d, want %d", got, code)
		}
	}
}

func TestNotServedSignal(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	w.send(order{Do: "die", N: int(syscall.SIGSEGV)})
	w = r.worker() // it crashed: that was not its decision
	r.signal(syscall.SIGTERM)
	if got := w.must(order{Do: "signal"}); got.Text != "terminated" {
		t.Errorf("the worker got %q", got.Text)
	}
	w.send(order{Do: "die", N: int(syscall.SIGTERM)})
	if got := r.code(); got != 128+15 {
		t.Errorf("the keeper ended with %d, want that of a process killed by SIGTERM", got)
	}
}

func TestReadyTimeout(t *testing.T) {
	o := quick()
	o.Ready = 100 * time.Millisecond
	r := newRig(t, o, nil)
	r.says("it was not ready in time")
	r.eventually("started anew", func() bool { return strings.Count(r.logged(), "worker is started") > 1 })
}

func TestEnd(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	w.serve()
	w.must(order{Do: "put", Name: "x", Path: r.file("x")})
	w.end(7)
}

// TestEndWished is a wish to end that outlives a worker which dies of something else.
func TestEndWished(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	w.serve()
	r.signal(syscall.SIGTERM)
	w.must(order{Do: "signal"})
	w.send(order{Do: "exit", N: 5})
	w = r.worker()
	w.serve()
	if got := w.must(order{Do: "signal"}); got.Text != "terminated" {
		t.Errorf("the second worker got %q", got.Text)
	}
	w.end(0)
}

func TestSignals(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	r.signal(syscall.SIGUSR1) // not yet: it would die of it, were it a little younger
	w.serve()
	if got := w.must(order{Do: "signal"}); got.Text != syscall.SIGUSR1.String() {
		t.Errorf("got %q for what came before it was ready", got.Text)
	}
	for _, s := range passed() {
		r.signal(s.(syscall.Signal))
		if got := w.must(order{Do: "signal"}); got.Text != s.String() {
			t.Errorf("got %q for %v", got.Text, s)
		}
	}
	w.end(0)
}

func TestBackoff(t *testing.T) {
	b := Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	var got []time.Duration
	for i := range 9 {
		got = append(got, b.pause(i)/time.Millisecond)
	}
	if want := []time.Duration{0, 100, 200, 400, 800, 1600, 3200, 5000, 5000}; !slices.Equal(got, want) {
		t.Errorf("pauses of %v ms, want %v", got, want)
	}
	if got := b.pause(1 << 40); got != b.Max {
		t.Errorf("after very many failures %v", got)
	}
}

// TestBackoffHolds sees that a worker is not started before its time.
func TestBackoffHolds(t *testing.T) {
	o := options{Backoff: Backoff{Min: 300 * time.Millisecond, Max: 300 * time.Millisecond}}
	r := newRig(t, o, nil)
	w := r.worker()
	w.serve()
	for i := range 3 {
		before := time.Now()
		w.send(order{Do: "exit", N: 1})
		w = r.worker()
		w.serve()
		if took := time.Since(before); i > 0 && took < o.Backoff.Min {
			t.Errorf("started after %v, want at least %v", took, o.Backoff.Min)
		}
	}
}
