package systemd

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

// TestGuests has the same in guests with cachefiles, which get this machine's systemd. The
// test runs on the host and in the guests.
func TestGuests(t *testing.T) {
	if os.Getenv("EROFSD_GUEST") != "" {
		t.Run("keeper", testCachefilesKeeper)
		t.Run("handover", testHandover)
		return
	}
	for _, tool := range []string{"mkfs.ext4", "qemu-system-x86_64", systemdProgram} {
		testenv.Tool(t, tool)
	}
	dir := t.TempDir()
	bin, vm, self := filepath.Join(dir, "bin"), filepath.Join(dir, "vm"), filepath.Join(dir, "systemd.test")
	build(t, "build", "-o", bin+"/", "./cmd/erofsd", "./cmd/erofsctl")
	build(t, "build", "-o", vm, "./kernel-tests/vm")
	build(t, "test", "-c", "-o", self, "./kernel-tests/systemd")
	for _, row := range guestkernel.Rows {
		t.Run(row, func(t *testing.T) {
			_, err := guestkernel.Find(t.Context(), row)
			if errors.Is(err, fs.ErrNotExist) {
				testenv.Need(t, "kernel-"+row, "needs the guest kernel "+row+": make kernel builds it")
			}
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), vm, "-kernel", row, "-timeout", "10m", "-share", "/usr", "-share", bin, "-env", envPrograms+"="+bin,
				self, "-test.v", "-test.timeout=9m", "-test.run=^TestGuests$")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s", err, &out)
			}
			for line := range strings.Lines(out.String()) {
				if strings.Contains(line, "_test.go:") {
					t.Log(strings.TrimSpace(line))
				}
			}
		})
	}
}

// testCachefilesKeeper kills all processes of erofsd.service, and its main process alone.
func testCachefilesKeeper(t *testing.T) {
	m, end := underLoad(t, setup{
		dropIn: "DeviceAllow=char-misc rw\nExecStart=\nExecStart=/usr/local/bin/erofsd --transport cachefiles --root /var/lib/erofsd --no-completion\n",
	})
	m.run("systemctl", "kill", "-s", "KILL", m.unit)
	m.restarted(1)
	m.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", m.unit)
	m.restarted(2)
	end()
}

// testHandover kills and restarts the daemon of erofsd-cachefiles.service, and stops it.
func testHandover(t *testing.T) {
	m, end := underLoad(t, setup{
		unit:   "erofsd-cachefiles.service",
		dropIn: "ExecStart=\nExecStart=/usr/local/bin/erofsd singleton --fscache /var/lib/erofsd/fscache --handover --no-completion\n",
	})
	m.run("systemctl", "kill", "-s", "KILL", m.unit)
	m.restarted(1)
	m.run("systemctl", "restart", m.unit)
	m.await("the next daemon", m.serves)
	one, point := end()
	m.run("systemctl", "stop", m.unit) // systemd lets go of the device
	s := &score{}
	for name := range one.files {
		s.file(one, point, name)
	}
	if s.wrong.Load() > 0 || s.failed.Load() == 0 {
		t.Errorf("after stop: %s", s)
	}
}
