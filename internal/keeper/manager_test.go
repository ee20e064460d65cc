package keeper

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A fakeManager is a service manager's end: it keeps descriptors as systemd does, the same
// open file only once.
type fakeManager struct {
	t    *testing.T
	conn *net.UnixConn
	env  []string
	done chan struct{}

	mu     sync.Mutex // guards what follows
	states map[string]int
	names  []string
	files  []*os.File
}

func newFakeManager(t *testing.T, env ...string) *fakeManager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &fakeManager{t: t, conn: conn, env: append(env, "NOTIFY_SOCKET="+path), done: make(chan struct{}), states: make(map[string]int)}
	go m.read()
	t.Cleanup(func() {
		conn.Close()
		<-m.done
		for _, f := range m.files {
			f.Close()
		}
	})
	return m
}

func (m *fakeManager) read() {
	defer close(m.done)
	p, oob := make([]byte, 4096), make([]byte, 256)
	for {
		n, oobn, _, _, err := m.conn.ReadMsgUnix(p, oob)
		if err != nil {
			return
		}
		fds, err := rights(oob[:oobn])
		if err != nil {
			m.t.Error(err)
		}
		m.take(string(p[:n]), fds)
	}
}

func (m *fakeManager) take(text string, fds []int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var name string
	for line := range strings.SplitSeq(text, "\n") {
		if s, found := strings.CutPrefix(line, "FDNAME="); found {
			name = s
		} else if line != "" {
			m.states[line]++
		}
	}
	if strings.Contains(text, "FDSTOREREMOVE=1") {
		for i := slices.Index(m.names, name); i >= 0; i = slices.Index(m.names, name) {
			m.files[i].Close()
			m.files, m.names = slices.Delete(m.files, i, i+1), slices.Delete(m.names, i, i+1)
		}
		return
	}
	for _, fd := range fds {
		if slices.ContainsFunc(m.files, func(f *os.File) bool { return keptAs(f, fd) }) {
			closeAll([]int{fd})
			continue
		}
		m.files, m.names = append(m.files, os.NewFile(uintptr(fd), name)), append(m.names, name)
	}
}

// keptAs reports whether fd is f's open file, as systemd asks.
func keptAs(f *os.File, fd int) bool {
	pid := uintptr(os.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, 0, f.Fd(), uintptr(fd), 0)
	return errno == 0 && order == 0
}

// heard is how often a state was sent.
func (m *fakeManager) heard(state string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.states[state]
}

// kept are the names of what it keeps.
func (m *fakeManager) kept() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.names)
}

// start starts a keeper with what is kept.
func (m *fakeManager) start(more ...*os.File) *rig {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	files, names := append(slices.Clone(more), m.files...), m.names
	for range more {
		names = append([]string{"somebody-elses"}, names...)
	}
	env := append(m.env, "LISTEN_PID=self", fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	return newRig(m.t, quick(), env, files...)
}

// die kills a keeper and its worker.
func (r *rig) die(w *remote) {
	r.t.Helper()
	r.signal(syscall.SIGKILL)
	r.code()
	if err := syscall.Kill(w.pid, syscall.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	r.eventually("the worker is dead", func() bool { return !running(w.pid) })
}

func TestNotify(t *testing.T) {
	m := newFakeManager(t, "WATCHDOG_USEC=20000")
	r := newRig(t, quick(), m.env)
	w := r.worker()
	if m.heard("READY=1")+m.heard("WATCHDOG=1") > 0 {
		t.Error("ready before the worker is")
	}
	w.serve()
	r.eventually("READY=1", func() bool { return m.heard("READY=1") == 1 })
	for _, n := range []int{3, 6} {
		r.eventually("signs of life", func() bool { return m.heard("WATCHDOG=1") >= n })
	}
	w.send(order{Do: "exit", N: 1})
	w = r.worker()
	pings := m.heard("WATCHDOG=1") // none that serves, but one is on its way
	r.eventually("signs of life during a restart", func() bool { return m.heard("WATCHDOG=1") > pings })
	w.serve()
	if m.heard("STOPPING=1") > 0 {
		t.Error("stopping, and nobody wished it")
	}
	w.end(0)
	if m.heard("READY=1") != 1 || m.heard("STOPPING=1") != 1 {
		t.Errorf("heard %v", m.states)
	}
}

// TestStore kills keeper and worker, twice: everything comes back from the service manager.
func TestStore(t *testing.T) {
	m := newFakeManager(t)
	r := newRig(t, quick(), m.env)
	w := r.worker()
	w.serve()
	path := r.file("f")
	w.must(order{Do: "put", Name: "journal", Data: "1", Path: path, N: 5})
	w.must(order{Do: "put", Name: "dropped", Path: path, N: 6})
	w.must(order{Do: "put", Name: "replaced", Data: "old", Path: path, N: 7})
	w.must(order{Do: "put", Name: "text", Data: "alone"})
	w.must(order{Do: "put", Name: "replaced", Data: "new", Path: path, N: 8})
	w.must(order{Do: "drop", Name: "dropped"})
	r.eventually("three descriptors and the worker's are kept", func() bool { return len(m.kept()) == 4 })
	r.die(w)

	want := []held{{"journal", "1", path, 5}, {"replaced", "new", path, 8}, {"text", "alone", "", 0}}
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	r2 := m.start(other)
	w = r2.worker()
	w.must(order{Do: "journal", Data: "x"}) // inherited, as after any death
	want[0].Offset++
	if list := w.serve(); !slices.Equal(list, want) {
		t.Errorf("from the service manager came\n%v\nwant\n%v", list, want)
	}
	w.must(order{Do: "put", Name: "later", Path: path, N: 9})
	want = append(want, held{"later", "", path, 9})
	w.must(order{Do: "put", Name: "replaced", Data: "newer", Path: path, N: 10})
	want[1] = held{"replaced", "newer", path, 10}
	r2.eventually("four descriptors and the worker's are kept", func() bool { return len(m.kept()) == 5 })
	r2.die(w)

	r3 := m.start()
	w = r3.worker()
	if list := w.serve(); !slices.Equal(list, want) {
		t.Errorf("the second time came\n%v\nwant\n%v", list, want)
	}
	w.end(0)
	r3.eventually("after an ordered end nothing is kept", func() bool { return len(m.kept()) == 0 })
}

// TestStoreUpgrade kills both after an upgrade: the new keeper has gone on with the store.
func TestStoreUpgrade(t *testing.T) {
	m := newFakeManager(t, "WATCHDOG_USEC=20000")
	r := newRig(t, quick(), m.env)
	w := r.worker()
	w.serve()
	path := r.file("f")
	w.must(order{Do: "put", Name: "before", Path: path, N: 1})
	next := begin(r, w, r.script("second", ""))
	yield(w)
	next.receive()
	next.must(order{Do: "ready"})
	r.says("keeper is the new executable")
	next.must(order{Do: "put", Name: "after", Data: "x", Path: path, N: 2})
	r.eventually("all is kept", func() bool { return len(m.kept()) == 4 })
	pings := m.heard("WATCHDOG=1")
	r.eventually("signs of life", func() bool { return m.heard("WATCHDOG=1") > pings })
	if m.heard("READY=1") != 1 || m.heard("STOPPING=1") != 0 {
		t.Errorf("heard %v", m.states)
	}
	r.die(next)

	r = m.start()
	w = r.worker()
	if list, want := w.serve(), []held{{"before", "", path, 1}, {"after", "x", path, 2}}; !slices.Equal(list, want) {
		t.Errorf("from the service manager came %v, want %v", list, want)
	}
	w.end(0)
}

// TestStoreOrphan kills the keeper alone: its worker has ended before the next one starts,
// which goes on with what it had.
func TestStoreOrphan(t *testing.T) {
	m := newFakeManager(t)
	r := newRig(t, quick(), m.env)
	for range 2 { // the second worker is one that was started after a death
		w := r.worker()
		w.serve()
		if w.must(order{Do: "returns"}).N != 1 {
			t.Error("the worker does not know that its keeper comes back")
		}
		w.send(order{Do: "exit", N: 1})
	}
	w := r.worker()
	w.serve()
	path := r.file("f")
	w.must(order{Do: "put", Name: "x", Path: path, N: 1})
	w.send(order{Do: "exit", N: 1})
	w = r.worker()
	w.serve()
	r.eventually("all is kept", func() bool { return len(m.kept()) == 3 })
	r.signal(syscall.SIGKILL)
	r.code()
	w.must(order{Do: "gone"})

	r2 := m.start()
	next := r2.worker()
	if running(w.pid) {
		t.Error("two workers live")
	}
	if list, want := next.serve(), []held{{"x", "", path, 1}}; !slices.Equal(list, want) {
		t.Errorf("from the service manager came %v, want %v", list, want)
	}
	next.end(0)
	r2.eventually("after an ordered end nothing is kept", func() bool { return len(m.kept()) == 0 })
}

// TestStoreNames: what comes back in one variable must fit into one (MAX_ARG_STRLEN).
func TestStoreNames(t *testing.T) {
	m := newFakeManager(t)
	t.Setenv("NOTIFY_SOCKET", m.conn.LocalAddr().String())
	var log bytes.Buffer
	manager, err := dialManager(slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer manager.close()
	variable, names := len("LISTEN_FDNAMES=")+1, 0
	for id := range uint64(MaxEntries) {
		if manager.note(fdName(1e6 + id)) {
			variable += len(fdName(1e6+id)) + 1
			names++
		}
	}
	if variable > 32*os.Getpagesize() || names < 15000 {
		t.Errorf("%d names are kept, in a variable of %d bytes", names, variable)
	}
	if got := strings.Count(log.String(), "no room"); got != 1 {
		t.Errorf("it was said %d times:\n%s", got, log.String())
	}
	manager.remove(fdName(1e6))
	if !manager.note(fdName(7)) {
		t.Error("there is no room again")
	}
}

// TestStoreSame replaces an entry by one with the very same open file, which a service
// manager does not take twice.
func TestStoreSame(t *testing.T) {
	m := newFakeManager(t)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	t.Setenv("NOTIFY_SOCKET", m.conn.LocalAddr().String())
	manager, err := dialManager(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer manager.close()
	table, err := newTable(manager)
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range []string{"one", "two"} {
		if err := table.put("same", []byte(data), duplicate(t, f)); err != nil {
			t.Fatal(err)
		}
	}
	manager.say("DONE=1")
	waitFor(t, "all was heard", func() bool { return m.heard("DONE=1") == 1 })
	if got := m.kept(); len(got) != 2 {
		t.Errorf("kept are %q, want the log and the file", got)
	}
	if err := table.close(true); err != nil {
		t.Fatal(err)
	}
}

// TestStoreLost has a service manager that did not keep everything.
func TestStoreLost(t *testing.T) {
	m := newFakeManager(t)
	r := newRig(t, quick(), m.env)
	w := r.worker()
	w.serve()
	path := r.file("f")
	w.must(order{Do: "put", Name: "kept", Path: path, N: 1})
	w.must(order{Do: "put", Name: "lost", Path: path, N: 2})
	r.eventually("all is kept", func() bool { return len(m.kept()) == 4 })
	r.die(w)
	m.take("FDSTOREREMOVE=1\nFDNAME="+m.kept()[3], nil)

	r = m.start()
	w = r.worker()
	if list := w.serve(); len(list) != 1 || list[0].Name != "kept" {
		t.Errorf("was given %v, want what was kept", list)
	}
	r.says("object=lost")
	w.end(0)
}

// TestNoManager has a socket where nobody listens.
func TestNoManager(t *testing.T) {
	r := newRig(t, quick(), []string{"NOTIFY_SOCKET=/nowhere"})
	if got := r.code(); got != 1 {
		t.Errorf("the keeper ended with %d, want 1", got)
	}
	r.says("NOTIFY_SOCKET")
}

// TestManagerGone has a service manager that goes away: the worker does not notice.
func TestManagerGone(t *testing.T) {
	m := newFakeManager(t)
	r := newRig(t, quick(), m.env)
	w := r.worker()
	w.serve()
	m.conn.Close()
	w.must(order{Do: "put", Name: "x", Path: r.file("f")})
	r.says("does not hear FDSTORE=1")
	w.end(0)
}

// TestManagerReturns has a service manager that goes away, and another one at its socket: that
// is given everything, also what was put meanwhile, and the next keeper has it from there.
func TestManagerReturns(t *testing.T) {
	m := newFakeManager(t, "WATCHDOG_USEC=20000")
	path := m.conn.LocalAddr().String()
	r := newRig(t, quick(), m.env)
	w := r.worker()
	w.serve()
	file := r.file("f")
	w.must(order{Do: "put", Name: "before", Path: file, N: 1})
	m.conn.Close()
	<-m.done
	w.must(order{Do: "put", Name: "between", Path: file, N: 2})
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	other := &fakeManager{t: t, conn: conn, env: m.env, done: make(chan struct{}), states: make(map[string]int)}
	go other.read()
	defer func() {
		conn.Close()
		<-other.done
		for _, f := range other.files {
			f.Close()
		}
	}()
	r.eventually("all is stored again", func() bool { return other.heard("READY=1") == 1 })
	w.must(order{Do: "put", Name: "after", Path: file, N: 3})
	r.eventually("what comes later is, too", func() bool { return len(other.kept()) == 5 })
	r.die(w)
	r = other.start()
	w = r.worker()
	if list := w.serve(); len(list) != 3 {
		t.Errorf("was given %v, want three entries", list)
	}
	w.end(0)
}

// TestManagerBusy has a service manager that reads nothing: it is waited for once.
func TestManagerBusy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	var log bytes.Buffer
	m, err := dialManager(slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	for i := 0; m.busy.IsZero() && i < 100000; i++ {
		m.say("STATUS=x")
	}
	for range 100 {
		m.say("STATUS=x")
	}
	if got := strings.Count(log.String(), "timeout"); m.busy.IsZero() || got != 1 {
		t.Errorf("it was waited for %d times:\n%s", got, log.String())
	}
}
