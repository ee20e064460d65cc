package services

import (
	"testing"

	"github.com/erofsd/erofsd/kernel-tests/debian"
)

// Containerd returns the path of containerd: the first in PATH, else Debian's. It looks for runc
// and its shim in PATH too.
func Containerd(t testing.TB) string {
	t.Helper()
	need(t, debian.Runc)
	return need(t, debian.Containerd)
}

// ContainerdProcess starts containerd with a configuration file and waits until it takes
// connections at its socket.
func ContainerdProcess(t testing.TB, config, socket string) *Process {
	t.Helper()
	return launch(t, socket, listens(socket), Containerd(t), "--config", config)
}

// SnapshotterProcess starts a snapshotter, program, and waits until it takes connections at
// its socket.
func SnapshotterProcess(t testing.TB, program, config, socket string) *Process {
	t.Helper()
	return launch(t, socket, listens(socket), program, "--config", config)
}
