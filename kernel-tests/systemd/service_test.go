package systemd

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/testenv"
)

// incomplete keeps images incomplete: the rest is not fetched by itself.
const incomplete = "ExecStart=\nExecStart=/usr/local/bin/erofsd --transport fanotify --root /var/lib/erofsd --no-completion\n"

// readersAtOnce is how many readers there are.
const readersAtOnce = 3

// TestSystemd is erofsd.service with fanotify, on this machine's kernel.
func TestSystemd(t *testing.T) {
	requireHost(t)
	bin := t.TempDir()
	build(t, "build", "-o", bin+"/", "./cmd/erofsd", "./cmd/erofsctl")
	t.Setenv(envPrograms, bin)
	for _, test := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"start", testStart},
		{"killed", testKilled},
		{"killed-and-stopped", testKilledAndStopped},
		{"keeper-killed", testKeeperKilled},
		{"watchdog", testWatchdog},
		{"upgrade", testUpgrade},
		{"restart", testRestart},
		{"stop", testStop},
		{"mount-meanwhile", testMountMeanwhile},
		{"units", testUnits},
	} {
		t.Run(test.name, test.do)
	}
}

// requireHost skips t unless this machine can do what it needs.
func requireHost(t *testing.T) {
	t.Helper()
	testenv.Root(t)
	testenv.Tool(t, systemdProgram)
	dir := t.TempDir()
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
}

// testStart: systemctl start returns when the API answers, and not before; after an ordered
// end nothing is left.
func testStart(t *testing.T) {
	m := boot(t, setup{})
	m.run("systemctl", "start", m.unit)
	if err := m.Health(t.Context()); err != nil {
		t.Errorf("started, and does not serve: %v", err)
	}
	v, err := m.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if main := m.number("MainPID"); main == v.PID || main == 0 {
		t.Errorf("the main process is %d, the worker %d", main, v.PID)
	}
	for _, pid := range []int{m.number("MainPID"), v.PID} {
		status := m.run("cat", fmt.Sprintf("/proc/%d/status", pid))
		for _, line := range []string{"Name:\terofsd", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(status, line) {
				t.Errorf("process %d is not confined: want %q\n%s", pid, line, status)
			}
		}
	}
	point := m.mount(m.newImage("one", 10, newSeed(t)))
	m.run("systemctl", "stop", m.unit)
	if got := m.state(); got != "inactive success" {
		t.Errorf("after stop the unit is %s", got)
	}
	if n := m.number("NFileDescriptorStore"); n != 0 {
		t.Errorf("%d descriptors are kept on", n)
	}
	m.await("the guard's end", func() bool { return len(m.guards()) == 0 })
	if names, err := os.ReadDir(point); err != nil || len(names) > 0 {
		t.Errorf("something is mounted still: %v, %v", names, err)
	}
}

// testKilled kills all processes of the unit, and the guard, below readers: nobody notices.
func testKilled(t *testing.T) {
	m, end := underLoad(t, setup{dropIn: incomplete})
	for n := range 3 {
		if n == 1 {
			m.run("systemctl", "daemon-reexec") // it keeps what it keeps
		}
		guard := m.guard()
		m.run("systemctl", "kill", "-s", "KILL", guard, m.unit)
		m.restarted(n + 1)
		if again := m.guard(); again == guard {
			t.Errorf("the guard is %q still", again)
		}
	}
	end()
}

// guard is the scope of the guard, of which there is one.
func (m *machine) guard() string {
	m.t.Helper()
	var guards []string
	m.await("one guard", func() bool {
		guards = m.guards()
		return len(guards) == 1
	})
	return guards[0]
}

// guards are the scopes of all guards.
func (m *machine) guards() (names []string) {
	m.t.Helper()
	out := m.run("systemctl", "list-units", "--no-legend", "--plain", "--state=running", "erofsd-guard-*.scope")
	for line := range strings.Lines(out) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	return names
}

// testKilledAndStopped kills all processes of the unit and stops it before it is started
// again: systemd lets go of all that it keeps. The guard, which is apart, answers EIO.
func testKilledAndStopped(t *testing.T) {
	seed := newSeed(t)
	m := boot(t, setup{dropIn: incomplete + "RestartSec=60\n"})
	m.run("systemctl", "start", m.unit)
	one := m.newImage("one", 50, seed)
	point := m.mount(one)
	m.run("systemctl", "kill", "-s", "KILL", m.unit)
	m.await("all to be dead", func() bool { return m.show("SubState") == "auto-restart" })
	m.run("systemctl", "stop", m.unit)
	s := &score{}
	for name := range one.files {
		s.file(one, point, name)
	}
	if n := int64(len(one.files)); s.wrong.Load() > 0 || s.failed.Load() != n {
		t.Errorf("want %d to fail: %s", n, s)
	}
	m.run("umount", "/mnt/one")
	m.await("the guard's end", func() bool { return len(m.guards()) == 0 })
	m.run("systemctl", "start", m.unit)
	m.all(one, m.mount(one))
}

// testKeeperKilled kills the main process alone: its worker serves on until systemd has
// started the next, which takes over from it.
func testKeeperKilled(t *testing.T) {
	m, end := underLoad(t, setup{dropIn: incomplete})
	for n := range 3 {
		m.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", m.unit)
		m.restarted(n + 1)
	}
	end()
}

// testWatchdog stops the main process: systemd kills and restarts it.
func testWatchdog(t *testing.T) {
	m, end := underLoad(t, setup{dropIn: incomplete + "WatchdogSec=6\nTimeoutStopSec=1\n"})
	m.run("systemctl", "kill", "--kill-whom=main", "-s", "STOP", m.unit)
	m.restarted(1)
	end()
	if journal := m.run("journalctl", "-u", m.unit); !strings.Contains(journal, "Watchdog timeout") {
		t.Errorf("it was not the watchdog:\n%s", journal)
	}
}

// testUpgrade: the main process stays the same one, and systemd goes on to keep what it has.
func testUpgrade(t *testing.T) {
	m, end := underLoad(t, setup{dropIn: incomplete})
	main := m.number("MainPID")
	for _, how := range [][]string{{"erofsctl", "upgrade"}, {"systemctl", "reload", m.unit}} {
		v, err := m.Version(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m.run(how...)
		after, err := m.Version(t.Context())
		if err != nil || after.PID == v.PID {
			t.Errorf("after %s the worker is %d, before %d; %v", how, after.PID, v.PID, err)
		}
	}
	if name := m.run("cat", fmt.Sprintf("/proc/%d/comm", main)); name != "erofsd\n" {
		t.Errorf("the main process is called %q", name)
	}
	if got := m.number("MainPID"); got != main || !m.serves() || m.number("NRestarts") != 0 {
		t.Errorf("the main process is %d, was %d, the unit %s", got, main, m.state())
	}
	m.run("systemctl", "kill", "-s", "KILL", m.unit)
	m.restarted(1)
	end()
}

// testRestart restarts the service below readers, who keep it from ending in time.
func testRestart(t *testing.T) {
	m, end := underLoad(t, setup{dropIn: incomplete + "TimeoutStopSec=2\n"})
	m.run("systemctl", "restart", m.unit)
	m.await("the next daemon", m.serves)
	end()
}

// testStop stops the service for good with an incomplete image in use: the daemon serves
// that on, and once nobody uses it the service starts again.
func testStop(t *testing.T) {
	seed := newSeed(t)
	m := boot(t, setup{dropIn: incomplete + "TimeoutStopSec=2\n"})
	m.run("systemctl", "start", m.unit)
	one := m.newImage("one", 50, seed)
	point := m.mount(one)
	used, err := os.Open(point)
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	m.run("systemctl", "stop", m.unit)
	if got := m.state(); got != "failed timeout" {
		t.Errorf("after stop the unit is %s", got)
	}
	m.all(one, point)
	used.Close()
	m.run("systemctl", "start", "--no-block", m.unit)
	m.await("the service to start again", m.serves)
	m.all(one, m.mount(one))
}

// testMountMeanwhile has an image mounted while the keeper cannot answer, and then dies:
// the mount fails, because the next daemon would not know of it, and succeeds then.
func testMountMeanwhile(t *testing.T) {
	seed := newSeed(t)
	m := boot(t, setup{dropIn: incomplete + "RestartSec=30\n"})
	m.run("systemctl", "start", m.unit)
	one := m.newImage("one", 50, seed)
	m.run("systemctl", "kill", "--kill-whom=main", "-s", "STOP", m.unit)
	failed := make(chan error)
	go func() {
		_, err := m.tryMount(one)
		failed <- err
	}()
	m.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", m.unit)
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("mount: %v", err)
	}
	m.run("systemctl", "restart", m.unit)
	point := m.mount(one)
	m.run("systemctl", "kill", "-s", "KILL", m.unit)
	m.run("systemctl", "restart", m.unit)
	m.all(one, point)
}

// underLoad boots a machine with an image that is read all the time. end ends that, fails
// the test if a read was not right, reads all of it once, and says what it was.
func underLoad(t *testing.T, s setup) (m *machine, end func() (i *image, point string)) {
	t.Helper()
	seed := newSeed(t)
	m = boot(t, s)
	m.run("systemctl", "start", m.unit)
	one := m.newImage("one", 100, seed)
	point := m.mount(one)
	stop := m.load(one, point, readersAtOnce, seed)
	return m, func() (*image, string) {
		t.Helper()
		stop()
		m.all(one, point)
		return one, point
	}
}

// restarted waits until systemd has restarted the unit n times, or more, and it serves.
func (m *machine) restarted(n int) {
	m.t.Helper()
	m.await("the next start", func() bool { return m.number("NRestarts") >= n && m.serves() })
}

// state is what systemd says of the unit.
func (m *machine) state() string { return m.show("ActiveState") + " " + m.show("Result") }

// testUnits: systemd finds nothing wrong with the units, and the one for fanotify as safe as
// it can be without mounts of its own.
func testUnits(t *testing.T) {
	m := boot(t, setup{})
	const snapshotter = "containerd-erofsd-grpc.service" // its program is not on this machine
	m.write("bin/containerd-erofsd-grpc", "#!/bin/sh\n")
	m.run("chmod", "755", "/usr/local/bin/containerd-erofsd-grpc")
	for _, name := range []string{m.unit, "erofsd-cachefiles.service", snapshotter} {
		path := "/etc/systemd/system/" + name
		if out, err := m.try("systemd-analyze", "verify", path); err != nil || out != "" {
			t.Errorf("%v\n%s", err, out)
		}
		if name == snapshotter {
			continue // it mounts, and starts what does
		}
		out, err := m.try("systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=51", path)
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		lines := strings.Split(strings.TrimSpace(out), "\n")
		t.Log(lines[len(lines)-1])
	}
}
