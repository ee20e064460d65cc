package keeper

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestThousandEntries(t *testing.T) {
	const n = 1000
	r := newRig(t, quick(), nil)
	w := r.worker()
	w.serve()
	before := r.fds()
	w.must(order{Do: "fill", Name: "e", Path: r.file("f"), N: n})
	if got := len(r.fds()) - len(before); got != n {
		t.Errorf("the keeper holds %d descriptors for %d entries", got, n)
	}
	w.send(order{Do: "die", N: int(syscall.SIGKILL)})

	w = r.worker()
	fds := w.must(order{Do: "fds"}).N
	list := w.serve()
	if len(list) != n {
		t.Fatalf("the successor was given %d entries, want %d", len(list), n)
	}
	for _, h := range list {
		var i int
		if _, err := fmt.Sscanf(h.Name, "e%04d", &i); err != nil || h.Data != h.Name || h.Offset != int64(i) || h.Target != r.dir+"/f" {
			t.Fatalf("entry %+v is not as it was put (%v)", h, err)
		}
	}
	if got := w.must(order{Do: "fds"}).N - fds; got != n {
		t.Errorf("the successor got %d descriptors, want %d", got, n)
	}

	w.must(order{Do: "fill", Name: "e", Path: r.file("f"), N: n}) // replaced by others of that name
	if got := len(r.fds()) - len(before); got != n {
		t.Errorf("the keeper holds %d descriptors after every entry was replaced", got)
	}
	for i := range n {
		w.must(order{Do: "drop", Name: fmt.Sprintf("e%04d", i)})
	}
	w.must(order{Do: "drop", Name: "never put"})
	if after := r.fds(); !slices.Equal(after, before) {
		t.Errorf("after all was dropped the keeper has\n%v\nbefore it had\n%v", after, before)
	}
}

// TestLimits exceeds them: the worker hears of it, and the keeper goes on.
func TestLimits(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	for _, o := range []order{{Do: "put", Name: "early"}, {Do: "drop", Name: "early"}, {Do: "ready"}, {Do: "yield"}, {Do: "upgrade"}} {
		if got := w.do(o); !strings.Contains(got.Err, "Entries") {
			t.Errorf("%s before Entries: %q", o.Do, got.Err)
		}
	}
	w.serve()
	if got := w.do(order{Do: "entries"}); !strings.Contains(got.Err, "before") {
		t.Errorf("Entries again: %q", got.Err)
	}
	for _, o := range []order{
		{Do: "put"},
		{Do: "put", Name: strings.Repeat("n", MaxName+1)},
		{Do: "put", Name: "d", Data: strings.Repeat("d", MaxData+1)},
	} {
		if got := w.do(o); !strings.Contains(got.Err, "limits") {
			t.Errorf("put of a name of %d bytes with %d bytes: %q", len(o.Name), len(o.Data), got.Err)
		}
	}
	name := strings.Repeat("n", MaxName)
	w.must(order{Do: "put", Name: name, Data: strings.Repeat("d", MaxData), Path: r.file("f"), N: 1})

	// No number is free in the keeper: the descriptor cannot arrive.
	limit := len(r.fds())
	setLimit(t, r.cmd.Process.Pid, uint64(limit))
	var refused string
	for i := 0; i < 100 && refused == ""; i++ {
		refused = w.do(order{Do: "put", Name: fmt.Sprint(i), Path: r.file("f")}).Err
	}
	if !strings.Contains(refused, "RLIMIT_NOFILE") {
		t.Errorf("put without a free descriptor: %q", refused)
	}
	w.must(order{Do: "put", Name: "without a file"})
	w.end(0)
}

// TestNoRoom is a worker that cannot take all that is held: it knows.
func TestNoRoom(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	w.serve()
	w.must(order{Do: "fill", Name: "e", Path: r.file("f"), N: 100})
	w.send(order{Do: "exit", N: 1})
	w = r.worker()
	limit := w.must(order{Do: "fds"}).N
	setLimit(t, w.pid, uint64(limit+50))
	if got := w.do(order{Do: "entries"}); !strings.Contains(got.Err, "RLIMIT_NOFILE") {
		t.Errorf("received %d of 100 entries: %q", len(got.Entries), got.Err)
	}
	if got := w.must(order{Do: "fds"}).N; got != limit {
		t.Errorf("then it has %d descriptors, before it had %d", got, limit)
	}
	w.send(order{Do: "exit", N: 1})
	if list := r.worker().serve(); len(list) != 100 {
		t.Errorf("its successor was given %d entries", len(list))
	}
}

// TestGone kills the keeper: the worker knows, and lives on.
func TestGone(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	w.serve()
	r.signal(syscall.SIGKILL)
	w.must(order{Do: "gone"})
	if got := w.do(order{Do: "put", Name: "x"}); !strings.Contains(got.Err, "dead") {
		t.Errorf("put without a keeper: %q", got.Err)
	}
	r.code()
	if !alive(w.pid) {
		t.Error("the worker died with its keeper")
	}
}

// TestGoneFirst: who is told that the keeper is dead finds Gone closed, also where the reader
// of its answers learns it last.
func TestGoneFirst(t *testing.T) {
	conn, keeper, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	if err := keeper.Close(); err != nil {
		t.Fatal(err)
	}
	c := &Client{conn: conn, turn: make(chan struct{}, 1), gone: make(chan struct{}), done: make(chan struct{}), calls: map[uint32]*call{}}
	time.AfterFunc(50*time.Millisecond, c.read)
	if err := c.Put(t.Context(), Entry{Name: "x"}); !errors.Is(err, errGone) {
		t.Errorf("put: %v", err)
	}
	select {
	case <-c.Gone():
	default:
		t.Error("Gone is open after an error says that the keeper is dead")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestClosed is a worker that has no connection any more but lives.
func TestClosed(t *testing.T) {
	r := newRig(t, quick(), nil)
	w := r.worker()
	w.serve()
	w.must(order{Do: "put", Name: "x", Data: "y"})
	w.must(order{Do: "close"})
	if list := r.worker().serve(); len(list) != 1 {
		t.Errorf("the successor was given %v", list)
	}
	r.says("its connection ended")
}

// TestSeparate sees what a worker shares with its keeper.
func TestSeparate(t *testing.T) {
	r := newRig(t, quick(), []string{"WATCHDOG_USEC=1000000", "LISTEN_PID=1"})
	w := r.worker()
	w.serve()
	env := strings.Split(w.must(order{Do: "env"}).Text, "\n")
	for _, v := range env {
		name, _, _ := strings.Cut(v, "=")
		if slices.Contains(append(managerEnv(), envSocket, envState), name) {
			t.Errorf("the worker has %s in its environment", v)
		}
	}
	keeperWant := "-999\n"
	ours := readFile(t, "/proc/self/oom_score_adj")
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		keeperWant = ours // not allowed here (CAP_SYS_RESOURCE)
	} else if err := os.WriteFile("/proc/self/oom_score_adj", []byte(ours), 0); err != nil {
		t.Fatal(err)
	}
	for pid, want := range map[int]string{r.cmd.Process.Pid: keeperWant, w.pid: "0\n"} {
		name := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
		if got, err := os.ReadFile(name); err != nil || string(got) != want {
			t.Errorf("%s is %q (%v), want %q", name, got, err, want)
		}
	}
	group, err := syscall.Getpgid(w.pid)
	if err != nil || group != w.pid {
		t.Errorf("the worker is in process group %d (%v), want one of its own", group, err)
	}
	w.end(0)
}

func TestNoKeeper(t *testing.T) {
	if c, err := Connect(); c != nil || err != nil {
		t.Errorf("without a keeper Connect returns %v, %v", c, err)
	}
	for _, value := range []string{"", "x", "-3", "1:2:3", ":", "987654"} {
		t.Setenv(envSocket, value)
		if c, err := Connect(); err == nil {
			t.Errorf("with %s=%q Connect returns %v", envSocket, value, c)
		}
		if _, found := os.LookupEnv(envSocket); found {
			t.Errorf("%s=%q is still in the environment", envSocket, value)
		}
	}
}

func TestCannotStart(t *testing.T) {
	r := newRig(t, options{}, []string{"LISTEN_PID=self", "LISTEN_FDS=many"})
	if got := r.code(); got != 1 {
		t.Errorf("the keeper ended with %d, want 1", got)
	}
	r.says("LISTEN_FDS")
}
