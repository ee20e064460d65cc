package keeper

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// upgradable is a keeper with a worker that serves and has put something.
func upgradable(t *testing.T, o options) (*rig, *remote, []held) {
	t.Helper()
	o.Version = "7"
	r := newRig(t, o, nil)
	w := r.worker()
	w.serve()
	w.must(order{Do: "put", Name: "journal", Data: "j", Path: r.file("journal"), N: 2})
	w.must(order{Do: "put", Name: "group", Data: "g", Path: r.file("group"), N: 17})
	w.must(order{Do: "put", Name: "text", Data: "t"})
	return r, w, []held{{"journal", "j", r.dir + "/journal", 2}, {"group", "g", r.dir + "/group", 17}, {"text", "t", "", 0}}
}

// begin has w upgrade to path and returns both, with the successor standing by.
func begin(r *rig, w *remote, path string) *remote {
	r.t.Helper()
	w.send(order{Do: "upgrade", Path: path})
	next := r.worker()
	if got := next.do(order{Do: "journal"}); got.Err != "none" {
		r.t.Errorf("a successor has the journal while its predecessor lives: %q", got.Err)
	}
	next.send(order{Do: "entries"})
	if got := w.receive(); got.Err != "" {
		r.t.Fatalf("upgrade: %s", got.Err)
	}
	return next
}

// yield ends w for its successor.
func yield(w *remote) {
	w.rig.t.Helper()
	w.must(order{Do: "yield"})
	w.send(order{Do: "exit"})
}

// build is what the keeper itself runs.
func (r *rig) build() string {
	env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", r.cmd.Process.Pid))
	for v := range strings.SplitSeq(string(env), "\x00") {
		if build, found := strings.CutPrefix(v, envBuild+"="); found {
			return build
		}
	}
	return ""
}

func TestUpgrade(t *testing.T) {
	r, w, want := upgradable(t, quick())
	before := r.fds()
	next := begin(r, w, r.script("second", ""))
	w.must(order{Do: "put", Name: "late", Data: "after the successor said hello"})
	want = append(want, held{"late", "after the successor said hello", "", 0})
	yield(w)
	if got := next.receive(); !slices.Equal(got.Entries, want) || got.Build != "second" {
		t.Errorf("the successor of build %q was given\n%v\nwant\n%v", got.Build, got.Entries, want)
	}
	next.must(order{Do: "journal", Data: "x"})
	want[0].Offset++
	next.must(order{Do: "ready"})
	next.must(order{Do: "put", Name: "during", Data: "the keeper's exec"})
	want = append(want, held{"during", "the keeper's exec", "", 0})
	r.eventually("the keeper is of the new build", func() bool { return r.build() == "second" })
	r.says("keeper is the new executable")
	if after := r.fds(); !slices.Equal(after, before) {
		t.Errorf("the new keeper has\n%v\nthe old one had\n%v", after, before)
	}

	// It does what keepers do: signals, put and drop, restart.
	r.signal(syscall.SIGHUP)
	if got := next.must(order{Do: "signal"}); got.Text != syscall.SIGHUP.String() {
		t.Errorf("the new keeper passed on %q", got.Text)
	}
	next.must(order{Do: "drop", Name: "text"})
	next.must(order{Do: "put", Name: "new", Path: r.file("new"), N: 1})
	want = append(slices.Delete(want, 2, 3), held{"new", "", r.dir + "/new", 1})
	next.send(order{Do: "exit", N: 3})
	last := r.worker()
	if list := last.serve(); !slices.Equal(list, want) || last.build != "second" {
		t.Errorf("after the upgrade a worker of build %q was given\n%v\nwant\n%v", last.build, list, want)
	}

	// And a second time.
	next = begin(r, last, r.script("third", ""))
	r.signal(syscall.SIGTERM) // the wish to end outlives this, too
	last.must(order{Do: "signal"})
	yield(last)
	if got := next.receive(); !slices.Equal(got.Entries, want) {
		t.Errorf("the second successor was given\n%v\nwant\n%v", got.Entries, want)
	}
	next.must(order{Do: "ready"})
	if got := next.must(order{Do: "signal"}); got.Text != "terminated" {
		t.Errorf("the second successor got %q", got.Text)
	}
	r.eventually("the keeper is of the third build", func() bool { return r.build() == "third" })
	next.end(4)
}

// TestUpgradeSame upgrades to the worker's own path.
func TestUpgradeSame(t *testing.T) {
	r, w, want := upgradable(t, quick())
	next := begin(r, w, "")
	yield(w)
	if got := next.receive(); !slices.Equal(got.Entries, want) {
		t.Errorf("the successor was given\n%v\nwant\n%v", got.Entries, want)
	}
	next.must(order{Do: "ready"})
	r.says("keeper is the new executable")
	next.end(0)
}

// TestUpgradeRefused tries what is no successor: the worker goes on.
func TestUpgradeRefused(t *testing.T) {
	r, w, want := upgradable(t, quick())
	plain := r.file("plain")
	for _, c := range []struct{ path, want string }{
		{r.dir + "/missing", "no such file"},
		{plain, "must be an executable"},
		{r.dir, "must be an executable"},
		{r.executable("broken", "exit 3"), "exit status 3"},
		{r.executable("crashing", "kill -SEGV $$"), "segmentation fault"},
	} {
		if got := w.do(order{Do: "upgrade", Path: c.path}); !strings.Contains(got.Err, c.want) {
			t.Errorf("upgrade to %s: %q, want %q", c.path, got.Err, c.want)
		}
		w.must(order{Do: "put", Name: "text", Data: "t"})
	}
	w.send(order{Do: "upgrade", Path: r.script("other", envVersion+"=8")})
	next := r.worker()
	next.send(order{Do: "entries"})
	if got := w.receive(); !strings.Contains(got.Err, `state version "8", this worker "7"`) {
		t.Errorf("upgrade to another state: %q", got.Err)
	}
	r.eventually("the successor is dead", func() bool { return !alive(next.pid) })
	w.send(order{Do: "exit", N: 9})
	w = r.worker()
	if list := w.serve(); !slices.Equal(list, want) || w.build != "" {
		t.Errorf("then build %q was given %v, want %v", w.build, list, want)
	}
	w.end(0)
}

// TestUpgradeMute has a successor that never says hello.
func TestUpgradeMute(t *testing.T) {
	o := quick()
	o.Hello = 100 * time.Millisecond
	r, w, _ := upgradable(t, o)
	if got := w.do(order{Do: "upgrade", Path: r.executable("mute", "exec sleep 1000")}); !strings.Contains(got.Err, "hello in time") {
		t.Errorf("upgrade to what says nothing: %q", got.Err)
	}
	w.must(order{Do: "put", Name: "text", Data: "t"})
	w.end(0)
}

// TestUpgradeStubborn has a worker that does not make way for its successor.
func TestUpgradeStubborn(t *testing.T) {
	o := quick()
	o.Yield = 100 * time.Millisecond
	r, w, want := upgradable(t, o)
	w.send(order{Do: "upgrade", Path: r.script("second", "")})
	next := r.worker()
	if got := next.must(order{Do: "entries"}); !slices.Equal(got.Entries, want) {
		t.Errorf("the successor was given %v, want %v", got.Entries, want)
	}
	if running(w.pid) {
		t.Error("the successor has the entries while its predecessor lives")
	}
	r.says("it did not yield")
}

// TestUpgradeGivenUp has a worker that does not wait for its successor any more.
func TestUpgradeGivenUp(t *testing.T) {
	r, w, want := upgradable(t, quick())
	if got := w.do(order{Do: "upgrade", Path: r.executable("slow", "exec sleep 1000"), N: 500}); !strings.Contains(got.Err, "deadline") {
		t.Fatalf("upgrade without the patience: %q", got.Err)
	}
	r.says("successor died before it could take over")
	w.must(order{Do: "put", Name: "text", Data: "t"})

	next := begin(r, w, r.script("second", ""))
	yield(w)
	if got := next.receive(); !slices.Equal(got.Entries, want) {
		t.Errorf("then a successor was given %v", got.Entries)
	}
}

// TestUpgradeBack has successors that take over and fail: the old executable comes back,
// even where its file is gone.
func TestUpgradeBack(t *testing.T) {
	r, w, want := upgradable(t, quick())
	first := r.script("first", "")
	next := begin(r, w, first)
	yield(w)
	next.receive()
	if err := os.Chmod(first, 0o600); err != nil { // so that the keeper cannot become it
		t.Fatal(err)
	}
	next.must(order{Do: "ready"})
	r.says("keeper goes on with its old executable")
	if err := os.Chmod(first, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	w = next
	for _, fail := range []order{{Do: "exit", N: 5}, {Do: "die", N: int(syscall.SIGKILL)}} {
		next = begin(r, w, r.script("bad", ""))
		yield(w)
		if got := next.receive(); !slices.Equal(got.Entries, want) {
			t.Errorf("the bad successor was given %v", got.Entries)
		}
		next.send(fail)
		w = r.worker()
		if list := w.serve(); !slices.Equal(list, want) || w.build != "first" {
			t.Errorf("then build %q was given %v, want %v", w.build, list, want)
		}
	}
	if got := r.build(); got != "" {
		t.Errorf("the keeper is of build %q", got)
	}
	w.end(0)
}

// TestUpgradeOrphan has a worker that dies while its successor has not said hello.
func TestUpgradeOrphan(t *testing.T) {
	r, w, want := upgradable(t, quick())
	w.send(order{Do: "upgrade", Path: r.script("second", "")})
	next := r.worker()
	if err := syscall.Kill(w.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	w = r.worker()
	if list := w.serve(); !slices.Equal(list, want) || w.build != "" {
		t.Errorf("build %q was given %v, want %v", w.build, list, want)
	}
	r.eventually("the successor is dead", func() bool { return !alive(next.pid) })
	next = begin(r, w, r.script("third", ""))
	yield(w)
	next.receive()
	next.must(order{Do: "ready"})
	next.end(0)
}

// TestYield is an ordered restart without an upgrade.
func TestYield(t *testing.T) {
	r, w, want := upgradable(t, quick())
	yield(w)
	w = r.worker()
	if list := w.serve(); !slices.Equal(list, want) {
		t.Errorf("was given %v, want %v", list, want)
	}
	w.end(0)
}

// TestUpgradeUnmanaged upgrades a keeper while its service manager is away.
func TestUpgradeUnmanaged(t *testing.T) {
	m := newFakeManager(t, "WATCHDOG_USEC=20000")
	r := newRig(t, quick(), m.env)
	w := r.worker()
	w.serve()
	w.must(order{Do: "put", Name: "x", Path: r.file("f"), N: 1})
	m.conn.Close()
	next := begin(r, w, r.script("second", ""))
	yield(w)
	next.receive()
	next.must(order{Do: "ready"})
	r.eventually("the keeper is of the new build", func() bool { return r.build() == "second" })
	next.must(order{Do: "put", Name: "y", Path: r.file("f"), N: 2})
	next.end(0)
}
