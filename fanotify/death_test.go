package fanotify

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/internal/testenv"
)

// buildWorker builds testdata/worker, which can be killed at any failpoint.
func buildWorker(t testing.TB) string {
	t.Helper()
	testenv.Tool(t, "go")
	program := filepath.Join(t.TempDir(), "worker")
	if out, err := exec.Command("go", "build", "-tags", "failpoint", "-o", program, "./testdata/worker").CombinedOutput(); err != nil {
		t.Fatalf("build the worker: %v\n%s", err, out)
	}
	return program
}

// A worker is a process that serves a group.
type worker struct {
	cmd  *exec.Cmd
	in   io.Closer
	out  strings.Builder
	err  strings.Builder
	done chan error
}

// A deathbed is what survives workers: the group with its mark, the journal, the
// cache file; and the content of that.
type deathbed struct {
	t       testing.TB
	program string
	s       *sparse
	data    string // path
	group   *os.File
	journal *os.File
}

func newDeathbed(t testing.TB, program string) *deathbed {
	t.Helper()
	d := &deathbed{t: t, program: program, s: newSparse(t, 1<<20+1234), data: filepath.Join(t.TempDir(), "data")}
	if err := os.WriteFile(d.data, d.s.data, 0o600); err != nil {
		t.Fatal(err)
	}
	g := realGroup(t, Options{})
	watch(t, g, d.s)
	err := control(g.f, func(fd int) error {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		d.group = os.NewFile(uintptr(fd), "group")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	d.journal = newJournal(t)
	t.Cleanup(func() { d.group.Close() })
	return d
}

// start starts a worker that dies as points say.
func (d *deathbed) start(points string, late bool) *worker {
	d.t.Helper()
	w := &worker{cmd: exec.Command(d.program, d.data), done: make(chan error, 1)}
	w.cmd.Env = append(os.Environ(), "EROFSD_FAILPOINT="+points)
	if late {
		w.cmd.Env = append(w.cmd.Env, "WORKER_LATE=1")
	}
	w.cmd.ExtraFiles = []*os.File{d.group, d.journal, d.s.f}
	w.cmd.Stdout, w.cmd.Stderr = &w.out, &w.err
	in, err := w.cmd.StdinPipe()
	if err != nil {
		d.t.Fatal(err)
	}
	w.in = in
	if err := w.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	go func() { w.done <- w.cmd.Wait() }()
	d.t.Cleanup(func() {
		_ = w.cmd.Process.Kill()
		in.Close()
	})
	return w
}

// end ends a worker in order and returns what it counted.
func (w *worker) end(t testing.TB) (st Stats) {
	t.Helper()
	w.in.Close()
	if err := <-w.done; err != nil {
		t.Fatalf("%v\n%s", err, w.err.String())
	}
	if err := json.Unmarshal([]byte(w.out.String()), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

const deathPatience = time.Minute

// Workers die at every failpoint, under 16 readers in another process that compare
// every byte; nobody sees zeros, an error, or nothing at all.
func TestKernelSuccessorsAfterEveryDeath(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "fanotify", Supported(t.TempDir()))
	program := buildWorker(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, name := range failpoint.Names {
		if !strings.HasPrefix(name, "fanotify.") {
			continue
		}
		for round := range 3 {
			deaths := []string{fmt.Sprintf("%s=kill@%d", name, 1+rng.IntN(40))}
			if strings.HasPrefix(name, "fanotify.takeover.") {
				// Both of these leave at least one event.
				before := []string{"fanotify.read", "fanotify.filled"}[rng.IntN(2)]
				deaths = []string{fmt.Sprintf("%s=kill@%d", before, 1+rng.IntN(20)), name + "=kill"}
				if rng.IntN(2) == 0 { // and once more, of what is left of that
					deaths = append(deaths, "fanotify.takeover.swept=kill")
				}
			}
			late := round == 2
			t.Run(fmt.Sprintf("%s,late=%v", strings.Join(deaths, ","), late), func(t *testing.T) {
				dieAndGoOn(t, newDeathbed(t, program), deaths, late)
			})
		}
	}
}

// The same at moments that nobody has chosen.
func TestKernelSuccessorsAfterDeathsAtAnyTime(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "fanotify", Supported(t.TempDir()))
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	d := newDeathbed(t, buildWorker(t))
	r := startReader(t, nil)
	r.want("ok", "open %s", d.s.f.Name())
	stop, read := make(chan struct{}), make(chan string)
	go func() {
		defer close(read)
		for {
			got := r.ask("parallel 16 %d", len(d.s.data))
			select {
			case read <- got:
			case <-stop:
				return
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	check := func(got string) {
		if got != sum(d.s.data) {
			t.Errorf("the readers got %q, want %q", got, sum(d.s.data))
		}
	}
	for range 25 {
		w := d.start("", false)
		for end := time.After(time.Duration(rng.Int64N(int64(100 * time.Millisecond)))); end != nil; {
			select {
			case got := <-read:
				check(got)
			case <-end:
				end = nil
			}
		}
		if err := w.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-w.done
	}
	last := d.start("", false)
	select {
	case got := <-read:
		check(got)
	case <-time.After(deathPatience):
		t.Fatalf("the readers are stuck: %s", last.err.String())
	}
	close(stop)
	if got, more := <-read; more {
		check(got)
	}
	if st := last.end(t); st.Swept+st.Denied+st.Lost+st.Malformed+st.Refused+st.Own != 0 {
		t.Errorf("%+v\n%s", st, last.err.String())
	}
}

func dieAndGoOn(t *testing.T, d *deathbed, deaths []string, late bool) {
	r := startReader(t, nil)
	r.want("ok", "open %s", d.s.f.Name())
	var reply <-chan string
	for i, points := range deaths {
		if strings.Contains(points, ".takeover.") && i == 0 {
			t.Fatal("nobody to take over from")
		}
		w := d.start(points, late)
		if reply == nil {
			reply = r.start("parallel 16 %d", len(d.s.data))
		}
		select {
		case err := <-w.done:
			if st, ok := w.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || st.Signal() != syscall.SIGKILL {
				t.Fatalf("%s: the worker ended with %v\n%s", points, err, w.err.String())
			}
		case got := <-reply:
			t.Fatalf("%s: the worker is still alive, and the readers have got %q", points, got)
		case <-time.After(deathPatience):
			t.Fatalf("%s: the worker is still alive", points)
		}
	}
	last := d.start("", late)
	select {
	case got := <-reply:
		if got != sum(d.s.data) {
			t.Errorf("the readers got %q, want %q", got, sum(d.s.data))
		}
	case <-time.After(deathPatience):
		t.Errorf("the readers are stuck: %s", last.err.String())
	}
	st := last.end(t)
	if st.Swept+st.Denied+st.Lost+st.Malformed+st.Refused+st.Own != 0 {
		t.Errorf("%+v\n%s", st, last.err.String())
	}
	j, err := openJournal(d.journal)
	if err != nil {
		t.Fatal(err)
	}
	defer j.release()
	for e, err := range j.events() {
		t.Errorf("event %+v is left in the journal (%v)", e, err)
	}
	if left := j.left(); len(left) != 0 {
		t.Errorf("the journal has %+v", left)
	}
}
