package systemd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pod runs erofsctl node as the pods of configs/helm do: in a mount namespace of its own, with
// the machine's root directory at /host.
func (m *machine) pod(args ...string) (string, error) {
	const enter = `mkdir -p /host && mount --rbind / /host && exec /source/pod/erofsctl node --configs /source/pod/etc "$@"`
	return m.try(append([]string{"unshare", "--mount", "sh", "-ec", enter, "sh"}, args...)...)
}

// TestNode installs, upgrades and removes by a pod, while an image is mounted and read.
func TestNode(t *testing.T) {
	requireHost(t)
	m := boot(t, setup{fresh: true})
	programs := filepath.Join(m.dir, "source", "pod") + "/"
	build(t, "build", "-o", programs, "./cmd/...")
	m.write("source/pod/etc/erofsd.toml", "[daemon]\nroot = \"/var/lib/erofsd\"\n[image.prefetch]\nenable = false\n")
	m.write("source/pod/etc/containerd-erofsd.toml", "[daemon]\nmode = \"connect\"\n")
	if out, err := m.pod("check"); err == nil {
		t.Errorf("nothing is installed, and check says %q", out)
	}
	m.pods("install")
	m.pods("check")
	if got := m.show("MainPID"); got == "0" || m.run("systemctl", "is-enabled", m.unit, "containerd-erofsd-grpc") != "enabled\nenabled\n" {
		t.Errorf("erofsd.service has the process %s", got)
	}
	seed := newSeed(t)
	one := m.newImage("one", 50, seed)
	end := m.load(one, m.mount(one), readersAtOnce, seed)
	worker := m.daemonPID()
	if out := m.pods("install"); out != "" || m.daemonPID() != worker {
		t.Errorf("nothing has changed, and it did something: %s", out)
	}
	// The next version: the same programs with other bytes behind them.
	for _, name := range []string{"erofsd", "containerd-erofsd-grpc"} {
		f, err := os.OpenFile(programs+name, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteString("next")
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	snapshotter := m.run("systemctl", "show", "-P", "MainPID", "containerd-erofsd-grpc")
	main := m.show("MainPID")
	m.pods("install")
	if next := m.daemonPID(); next == worker {
		t.Errorf("the worker is %d still", next)
	}
	if m.show("MainPID") != main {
		t.Error("erofsd.service was restarted, and not handed over")
	}
	if m.run("systemctl", "show", "-P", "MainPID", "containerd-erofsd-grpc") == snapshotter {
		t.Error("the snapshotter was not restarted")
	}
	end()
	m.run("umount", "/mnt/one")
	m.write("snapshots/io.containerd.snapshotter.v1.erofsd/snapshots/1/fs/file", "of a container")
	if _, err := m.pod("remove"); err == nil || !strings.Contains(err.Error(), "crictl rmi") {
		t.Errorf("removed below containerd: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(m.dir, "snapshots/io.containerd.snapshotter.v1.erofsd/snapshots/1")); err != nil {
		t.Fatal(err)
	}
	m.pods("remove")
	for _, dir := range []string{"/etc/systemd/system", "/usr/local/bin", "/etc/erofsd"} {
		out := m.run("find", dir, "-type", "f")
		if out != "" {
			t.Errorf("left over: %s", out)
		}
	}
	if state := m.show("ActiveState"); state != "inactive" {
		t.Errorf("erofsd.service is %s", state)
	}
}

// pods is pod, which must succeed.
func (m *machine) pods(args ...string) string {
	m.t.Helper()
	out, err := m.pod(args...)
	if err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	return out
}
