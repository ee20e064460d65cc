package smoke

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/internal/daemon"
)

// supervised is a job with a supervisor.
func (m *machine) supervised(s *supervisor, name string) job {
	j := m.job()
	j.Socket = filepath.Join(m.dir, name+".sock")
	j.Options.Nydusd.ID, j.Options.Nydusd.Supervisor = name, s.socket
	return j
}

// sendTo has the daemon give its state to the supervisor, as after every mount and unmount.
func (p *process) sendTo(s *supervisor) {
	p.t.Helper()
	err := s.fetch(p.t, func() { p.want(http.StatusNoContent, "PUT", "/api/v1/daemon/fuse/sendfd", nil) })
	if err != nil {
		p.t.Fatalf("the state that the daemon gives: %v\n%s", err, p.log())
	}
}

// takeFrom has the daemon take the state over.
func (p *process) takeFrom(s *supervisor) {
	p.t.Helper()
	err := s.give(p.t, func() { p.want(http.StatusNoContent, "PUT", "/api/v1/daemon/fuse/takeover", nil) })
	if err != nil {
		p.t.Fatalf("the state that the daemon gets: %v\n%s", err, p.log())
	}
	p.wantState("READY")
}

// noSupervisor is what a case about supervisors shows with fanotify: nothing can be handed
// over there yet (issue 6), and the API says so instead of losing images.
func noSupervisor(t *testing.T, r row) {
	m := newMachine(t, r)
	s := newSupervisor(t, m)
	j := m.supervised(s, "one")
	p := m.start(t, j)
	p.want(http.StatusInternalServerError, "PUT", "/api/v1/daemon/fuse/sendfd", nil, "UpgradeManager(StorageBackendError(NoEnoughFds))")
	t.Log("fanotify's group is not handed over yet (issue 6): nothing is upgraded here")
}

// testHotUpgrade replaces a daemon that serves two mounted images, while they are read.
func testHotUpgrade(t *testing.T, r row) {
	if r.name == daemon.Fanotify {
		noSupervisor(t, r)
		return
	}
	m := newMachine(t, r)
	sup := newSupervisor(t, m)
	p := m.start(t, m.supervised(sup, "api0"))
	list := []*snapshot{
		m.snapshot(t, r.images.get(t, "one", "one"), "1", "shared"), m.snapshot(t, r.images.get(t, "two", "two"), "2", "shared"),
	}
	for _, s := range list {
		p.bind(s)
		p.mount(s)
		p.sendTo(sup)
	}
	if err := list[0].image.readFile(list[0].point, "big"); err != nil {
		t.Error(err)
	}
	for n := range 3 {
		p = m.upgrade(t, p, sup, fmt.Sprintf("api%d", n+1), list)
	}
	for _, s := range list {
		s.image.compare(t, s.point)
		p.remove(s)
		p.sendTo(sup)
	}
	for _, s := range list {
		p.cullBlobs(s.image)
	}
	m.awaitEmpty(t)
	sup.drop()
	p.stop()
}

// upgrade starts a new daemon beside old, as nydus-snapshotter does, and returns it.
// Whoever reads meanwhile waits.
func (m *machine) upgrade(t *testing.T, old *process, sup *supervisor, name string, list []*snapshot) *process {
	t.Helper()
	j := m.supervised(sup, name)
	j.Options.Nydusd.Upgrade = true
	next := m.start(t, j)
	next.wantState("INIT")
	next.want(http.StatusInternalServerError, "PUT", "/api/v1/daemon/fuse/takeover", nil, "UpgradeManager(") // nobody gives
	next.wantState("INIT")
	old.sendTo(sup)
	next.takeFrom(sup)
	old.want(http.StatusNoContent, "PUT", "/api/v1/daemon/exit", nil)
	old.awaitEnd()
	old.checkEnd()
	old.checkHungUp()
	var readers sync.WaitGroup
	for _, s := range list {
		readers.Go(func() {
			if err := s.image.readFile(s.point, "text"); err != nil {
				t.Errorf("read during an upgrade: %v", err)
			}
		})
	}
	next.want(http.StatusNoContent, "PUT", "/api/v1/daemon/start", nil)
	next.wantState("RUNNING")
	readers.Wait()
	for _, s := range list {
		next.bind(s)
	}
	next.sendTo(sup)
	next.checkAlive()
	return next
}

// testFailover kills a daemon that serves many images, one of them being read: they are
// read on when the next one has taken over, which is started without a word about it.
func testFailover(t *testing.T, r row) {
	if r.name == daemon.Fanotify {
		noSupervisor(t, r)
		return
	}
	const count = 12
	m := newMachine(t, r)
	sup := newSupervisor(t, m)
	j := m.supervised(sup, "api")
	j.Options.NoCompletion = true
	p := m.start(t, j)
	var list []*snapshot
	for n := range count {
		name := []string{"one", "two", "three", "four"}[n%4]
		s := m.snapshot(t, r.images.get(t, name, name), fmt.Sprint(n), "")
		p.bind(s)
		p.mount(s)
		list = append(list, s)
	}
	p.sendTo(sup)
	for round := range 2 {
		p.signal(syscall.SIGKILL)
		p.checkHungUp()
		var readers sync.WaitGroup
		for _, s := range list[:4] {
			readers.Go(func() {
				if err := s.image.readFile(s.point, []string{"big", "dir/middle"}[round]); err != nil {
					t.Errorf("read during a failover: %v", err)
				}
			})
		}
		p = m.start(t, j)
		p.wantState("INIT")
		p.takeFrom(sup)
		p.want(http.StatusNoContent, "PUT", "/api/v1/daemon/start", nil)
		p.wantState("RUNNING")
		readers.Wait()
		p.sendTo(sup)
	}
	for n, s := range list {
		if n < 4 {
			s.image.compare(t, s.point)
		} else if err := s.image.readFile(s.point, "dir/small"); err != nil {
			t.Error(err)
		}
		p.remove(s)
	}
	sup.drop()
	p.stop()
}

// testF15: the state holds what is bound at that moment, as often as it is asked for, and
// another daemon's state, or a descriptor of something else, is refused and changes nothing.
func testF15(t *testing.T, r row) {
	if r.name == daemon.Fanotify {
		noSupervisor(t, r)
		return
	}
	m := newMachine(t, r)
	sup := newSupervisor(t, m)
	p := m.start(t, m.supervised(sup, "api0"))
	one := m.snapshot(t, r.images.get(t, "one", "one"), "1", "")
	two := m.snapshot(t, r.images.get(t, "two", "two"), "2", "")
	p.sendTo(sup)
	if !json.Valid(sup.data) || bytes.Contains(sup.data, []byte(one.fsid)) {
		t.Errorf("the state of a daemon without images: %s", sup.data)
	}
	p.bind(one)
	p.bind(two)
	p.sendTo(sup)
	for _, s := range []*snapshot{one, two} {
		if !bytes.Contains(sup.data, []byte(s.fsid)) {
			t.Errorf("image %s is bound, and not in the state: %s", s.fsid, sup.data)
		}
	}
	p.forget(two)
	p.sendTo(sup)
	if bytes.Contains(sup.data, []byte(two.fsid)) {
		t.Errorf("image %s is unbound, and in the state: %s", two.fsid, sup.data)
	}
	right := supervisor{socket: sup.socket, data: sup.data, fd: sup.fd}
	p.stop()

	j := m.supervised(sup, "api1")
	j.Options.Nydusd.Upgrade = true
	p = m.start(t, j)
	for what, wrong := range map[string]supervisor{
		"another daemon's state": {sup.socket, []byte("\x01\x02 nydusd's own form"), right.fd},
		"a later version":        {sup.socket, bytes.Replace(right.data, []byte(`"version":1`), []byte(`"version":99`), 1), right.fd},
		"no descriptor":          {sup.socket, right.data, -1},
		"a regular file":         {sup.socket, right.data, regularFile(t, m)},
	} {
		err := wrong.give(t, func() {
			p.want(http.StatusInternalServerError, "PUT", "/api/v1/daemon/fuse/takeover", nil, "Upgrade(DaemonAbnormal(UpgradeManager(")
		})
		if err != nil && !strings.Contains(err.Error(), "broken pipe") && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: %v", what, err)
		}
		p.wantState("INIT")
		p.want(http.StatusBadRequest, "PUT", "/api/v1/daemon/start", nil, "UnexpectedEvent(")
	}
	p.takeFrom(&right)
	p.want(http.StatusNoContent, "PUT", "/api/v1/daemon/start", nil)
	if l := p.list(one.domain); len(l) == 0 || l[0].ID != one.fsid {
		t.Errorf("after the takeover, bound in the domain of %s: %+v", one.fsid, l)
	}
	p.mount(one)
	one.image.compare(t, one.point)
	p.remove(one)
}

// regularFile opens a file, whose descriptor is closed with the test.
func regularFile(t *testing.T, m *machine) int {
	t.Helper()
	fd, err := syscall.Open(filepath.Join(m.dir, "file"), syscall.O_CREAT|syscall.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	return fd
}

// testRestore: one image whose bootstrap has vanished does not strand the others.
func testRestore(t *testing.T, r row) {
	m := newMachine(t, r)
	sup := newSupervisor(t, m)
	j := m.supervised(sup, "api")
	p := m.start(t, j)
	one := m.snapshot(t, r.images.get(t, "one", "one"), "1", "")
	two := m.snapshot(t, r.images.get(t, "two", "two"), "2", "")
	p.bind(one)
	p.bind(two)
	p.mount(one)
	p.sendTo(sup)
	p.signal(syscall.SIGKILL)
	for _, dir := range []string{m.root, filepath.Dir(two.entry.Config.MetadataPath)} {
		err := filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
			if err == nil && st.Mode().IsRegular() && (strings.Contains(path, two.fsid) || path == two.entry.Config.MetadataPath) {
				return os.Remove(path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	p = m.start(t, j)
	p.takeFrom(sup)
	p.want(http.StatusNoContent, "PUT", "/api/v1/daemon/start", nil)
	p.wantState("RUNNING")
	one.image.compare(t, one.point)
	if l := p.list(two.domain); len(l) != 0 {
		t.Errorf("bound without a bootstrap: %+v", l)
	}
	p.remove(one)
	sup.drop()
}
