package services

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/kernel-tests/debian"
)

// A Runtime is containerd with its shim and its client, ctr. Their runc is Debian's.
type Runtime struct {
	Version string // as it says itself: "1.6.20~ds1"

	dir string // of its programs; "": they are in PATH
}

// Containerd returns the containerd in PATH, which is Debian's if there was none.
func Containerd(t testing.TB) Runtime {
	t.Helper()
	need(t, debian.Runc)
	need(t, debian.Containerd)
	return versioned(t, Runtime{})
}

// containerd2Version is pinned here: programs are built from their module at this version. The
// client that tests use is the one of go.mod.
const containerd2Version = "v2.4.2"

// Containerd2 returns containerd 2, which it builds once.
func Containerd2(t testing.TB) Runtime {
	t.Helper()
	need(t, debian.Runc)
	const module = "github.com/containerd/containerd/v2/cmd/"
	dir := goInstalled(t, "containerd", containerd2Version, module+"containerd", module+"containerd-shim-runc-v2", module+"ctr")
	return versioned(t, Runtime{dir: dir})
}

// versioned asks r for its version.
func versioned(t testing.TB, r Runtime) Runtime {
	t.Helper()
	out, err := r.command(t.Context(), "containerd", "--version").Output()
	fields := strings.Fields(string(out)) // containerd MODULE VERSION ...
	if err != nil || len(fields) < 3 {
		t.Fatalf("ask containerd for its version: %v: %q", err, out)
	}
	r.Version = strings.TrimPrefix(fields[2], "v")
	return r
}

// Two says whether it is containerd 2, with its configuration's version 3 and services that 1
// lacks.
func (r Runtime) Two() bool { return strings.HasPrefix(r.Version, "2.") }

// Start starts containerd with a configuration file and waits until it takes connections at
// its socket. It finds its shim, and runc, in PATH.
func (r Runtime) Start(t testing.TB, config, socket string) *Process {
	t.Helper()
	cmd := r.command(t.Context(), "containerd", "--config", config)
	return begin(t, &Process{Addr: socket, argv: cmd.Args, env: cmd.Env, ready: listens(socket)})
}

// Ctr runs ctr and returns what it prints.
func (r Runtime) Ctr(ctx context.Context, t testing.TB, socket, namespace string, args ...string) string {
	t.Helper()
	cmd := r.command(ctx, "ctr", append([]string{"--address", socket, "--namespace", namespace}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("ctr %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// command is a program of it that finds the others.
func (r Runtime) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(r.dir, program), args...)
	if r.dir != "" {
		cmd.Env = append(os.Environ(), "PATH="+r.dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	}
	return cmd
}

// SnapshotterProcess starts a snapshotter, program, and waits until it takes connections at
// its socket.
func SnapshotterProcess(t testing.TB, program, config, socket string) *Process {
	t.Helper()
	return launch(t, socket, listens(socket), program, "--config", config)
}
