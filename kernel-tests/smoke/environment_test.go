package smoke

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/testenv"
)

// testDeviceHeld: the distribution's cachefilesd, say, has the device. The daemon ends, its
// error says why, and when the device is free the next start works.
func testDeviceHeld(t *testing.T, r row) {
	m := newMachine(t, r)
	holder, err := cachefiles.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	p := m.launch(t, m.job())
	p.awaitEnd()
	if code := p.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("it ended with %d, want 1", code)
	}
	for _, part := range []string{cachefiles.DevicePath, "another daemon has it", fmt.Sprintf("process %d", os.Getpid())} {
		if !strings.Contains(p.log(), part) {
			t.Errorf("want %q in\n%s", part, p.log())
		}
	}
	if _, err := os.Lstat(p.socket); err == nil {
		t.Error("it left a socket, which says to the next start that a daemon crashed")
	}
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	m.start(t, m.job()).stop()
}

// weakLimit is the limit of descriptors that a daemon without CAP_SYS_RESOURCE cannot raise.
const weakLimit = 1024

// testNoSysResource starts the program itself in what is like a container without
// CAP_SYS_RESOURCE: the limit stays as it is, which is a warning, and it serves.
func testNoSysResource(t *testing.T, r row) {
	m := newMachine(t, r)
	program := filepath.Join(m.dir, "erofsd")
	build := exec.CommandContext(t.Context(), testenv.Tool(t, "go"), "build", "-o", program, "./cmd/erofsd")
	build.Dir = testenv.ModuleRoot(t)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	j := m.job()
	p := m.begin(t, j.Socket, []string{
		weakName, program, "--root", j.Options.Root, "--transport", r.name, "--apisock", j.Socket,
	})
	await(t, "the API to answer", func() bool {
		if p.hasEnded() {
			t.Fatalf("it ended: %s\n%s", p.cmd.ProcessState, p.log())
		}
		_, _, err := p.do("GET", "/api/v1/daemon", nil)
		return err == nil
	})
	var l unix.Rlimit
	if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_NOFILE, nil, &l); err != nil || l.Max != weakLimit {
		t.Errorf("its limit: %+v, %v", l, err)
	}
	if !strings.Contains(p.log(), "WARN") || !strings.Contains(p.log(), fmt.Sprint(weakLimit)) {
		t.Errorf("want a warning with the limit in\n%s", p.log())
	}
	p.wantState("RUNNING")
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	p.bind(s)
	p.mount(s)
	s.image.compare(t, s.point)
	p.remove(s)
	p.stop()
}
