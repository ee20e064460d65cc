package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A fakeProc is a directory like procfs.
type fakeProc struct {
	t   *testing.T
	dir string
}

func newFakeProc(t *testing.T) fakeProc {
	p := fakeProc{t, t.TempDir()}
	p.write("1/stat", "")
	p.link(initialPIDs)
	return p
}

func (p fakeProc) write(name, text string) {
	p.t.Helper()
	name = filepath.Join(p.dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// link says in which pid namespace this process is.
func (p fakeProc) link(ns string) {
	p.t.Helper()
	name := filepath.Join(p.dir, "self/ns/pid")
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		p.t.Fatal(err)
	}
	_ = os.Remove(name) // it may not be there
	if err := os.Symlink(ns, name); err != nil {
		p.t.Fatal(err)
	}
}

// task is a thread of process 7: its state, times, and for "D" its number of waits.
func (p fakeProc) task(tid int, state string, user, system, waits int, start string) {
	p.t.Helper()
	dir := fmt.Sprintf("7/task/%d/", tid)
	p.write(dir+"stat", fmt.Sprintf("%d (a) R (b) %s 1 1 1 0 -1 0 0 0 0 0 %d %d 0 0 20 0 1 0 %s 0 0\n", tid, state, user, system, start))
	p.write(dir+"status", fmt.Sprintf("Name:\tx\nvoluntary_ctxt_switches:\t%d\nnonvoluntary_ctxt_switches:\t9\n", waits))
}

// TestQuiescence: a tick has passed when every task that was runnable or in an
// uninterruptible wait then has been seen elsewhere.
func TestQuiescence(t *testing.T) {
	type state struct {
		state               string
		user, system, waits int
		start               string
	}
	for name, c := range map[string]struct {
		first, later state
		rounds       int // that it takes for the task to have left; 0: it does not leave
	}{
		"sleeps":             {state{"R", 5, 5, 0, "9"}, state{"S", 5, 5, 0, "9"}, 1},
		"stopped":            {state{"D", 5, 5, 1, "9"}, state{"T", 5, 5, 1, "9"}, 1},
		"idle":               {state{"D", 5, 5, 1, "9"}, state{"I", 5, 5, 1, "9"}, 1},
		"dead":               {state{"R", 5, 5, 0, "9"}, state{"Z", 5, 5, 0, "9"}, 1},
		"another":            {state{"R", 5, 5, 0, "9"}, state{"R", 5, 5, 0, "10"}, 1},
		"runs for itself":    {state{"R", 5, 5, 0, "9"}, state{"R", 5 + userEnough, 5, 0, "9"}, 1},
		"ran hardly":         {state{"R", 5, 5, 0, "9"}, state{"R", 4 + userEnough, 5, 0, "9"}, 0},
		"starves":            {state{"R", 5, 5, 0, "9"}, state{"R", 5, 5, 0, "9"}, 0},
		"works in kernel":    {state{"R", 5, 5, 0, "9"}, state{"R", 5, 4 + systemEnough, 0, "9"}, 0},
		"stays in kernel":    {state{"R", 5, 5, 0, "9"}, state{"R", 5, 5 + systemEnough, 0, "9"}, 1},
		"waits on":           {state{"D", 5, 5, 3, "9"}, state{"D", 5, 5, 3, "9"}, stillRounds},
		"waits again":        {state{"D", 5, 5, 3, "9"}, state{"D", 5, 5, 4, "9"}, 1 + stillRounds},
		"waited, is not run": {state{"D", 5, 5, 3, "9"}, state{"R", 5, 5, 3, "9"}, 0},
	} {
		p := newFakeProc(t)
		set := func(s state) { p.task(8, s.state, s.user, s.system, s.waits, s.start) }
		q := quiescence{proc: p.dir}
		look := func(now uint32, want bool) {
			t.Helper()
			if err := q.look(now, want); err != nil {
				t.Fatal(err)
			}
		}
		set(c.first)
		look(3, false)
		look(4, true)
		set(c.later)
		rounds := 0
		for now := uint32(5); q.passed == 0 && now < 5*stillRounds; now++ {
			look(now, false)
			rounds++
		}
		if c.rounds == 0 && q.passed != 0 || c.rounds > 0 && (q.passed != 4 || rounds != c.rounds) {
			t.Errorf("%s: passed %d after %d rounds, want %d rounds", name, q.passed, rounds, c.rounds)
		}
	}
}

// TestQuiescenceCohorts: who was not there counts for nobody, and later cohorts for earlier.
func TestQuiescenceCohorts(t *testing.T) {
	p := newFakeProc(t)
	q := quiescence{proc: p.dir}
	look := func(now, passed uint32, cohorts int) {
		t.Helper()
		if err := q.look(now, true); err != nil {
			t.Fatal(err)
		}
		if q.passed != passed || len(q.cohorts) != cohorts {
			t.Errorf("at %d: passed %d, %d cohorts; want %d, %d", now, q.passed, len(q.cohorts), passed, cohorts)
		}
	}
	p.task(8, "R", 0, 0, 0, "1")
	p.task(9, "S", 0, 0, 0, "1")
	look(10, 0, 1)
	look(11, 0, 1) // too soon for another
	p.task(9, "R", 0, 0, 0, "1")
	look(15, 0, 2)
	p.task(8, "S", 0, 0, 0, "1")
	look(20, 10, 2) // that of 15, where 9 is; another is made
	p.task(9, "S", 0, 0, 0, "1")
	look(21, 20, 1) // of all of them; another is made
	look(22, 21, 1)
	p.task(8, "R", 0, 0, 0, "1")
	for now := uint32(30); now < 100; now += cohortPause {
		if err := q.look(now, true); err != nil {
			t.Fatal(err)
		}
		if len(q.cohorts) > maxCohorts {
			t.Fatalf("%d cohorts", len(q.cohorts))
		}
	}
}

// TestQuiescenceBlind: where tasks are hidden nothing passes.
func TestQuiescenceBlind(t *testing.T) {
	p := newFakeProc(t)
	for want, hide := range map[string]func(){
		"hostPID":  func() { p.link("pid:[4026532000]") },
		"hidepid":  func() { p.link(initialPIDs); os.RemoveAll(filepath.Join(p.dir, "1")) },
		"thread 8": func() { p.write("1/stat", ""); p.write("7/task/8/stat", "8 (x) R 1") },
	} {
		q := quiescence{proc: p.dir}
		hide()
		if err := q.look(4, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error about %s: %v", want, err)
		}
		if err := q.look(9, false); err != nil || q.passed != 0 {
			t.Errorf("%s: passed %d, %v", want, q.passed, err)
		}
		p.link(initialPIDs)
		p.write("1/stat", "")
		os.RemoveAll(filepath.Join(p.dir, "7"))
	}
}

// TestQuiescenceOfKernel: with the real procfs time passes.
func TestQuiescenceOfKernel(t *testing.T) {
	q := quiescence{proc: "/proc"}
	now := uint32(1)
	await(t, "quiescence", func() bool {
		now++
		if err := q.look(now, true); err != nil {
			t.Fatal(err)
		}
		return q.passed > 0
	})
}
