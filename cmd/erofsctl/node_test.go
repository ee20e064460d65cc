package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A fakeNode is a node whose systemd only remembers what it was told.
type fakeNode struct {
	node
	t      *testing.T
	dir    string
	told   []string // what systemctl was told since it was asked last
	active map[string]bool
	broken string // the command of systemctl that fails
	out    bytes.Buffer
}

func newFakeNode(t *testing.T) *fakeNode {
	t.Helper()
	dir := shortDir(t)
	f := &fakeNode{t: t, dir: dir, active: map[string]bool{}}
	f.write("node/run/systemd/system/.keep", "")
	f.write("node/etc/containerd/config.toml", "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n")
	for _, name := range nodePrograms {
		f.write("pod/bin/"+name, "#!/bin/sh\nexit 0\n")
		if err := os.Chmod(filepath.Join(dir, "pod/bin", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	f.write("pod/etc/erofsd.toml", "[daemon]\n")
	f.write("pod/etc/containerd-erofsd.toml", "[daemon]\nmode = \"connect\"\n")
	host, err := os.OpenRoot(filepath.Join(dir, "node"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	f.node = node{
		host: host, programs: filepath.Join(dir, "pod/bin"), configs: filepath.Join(dir, "pod/etc"), bin: "/opt/erofsd/bin",
		systemctl: f.tell, probe: func(string) error { return nil }, out: &f.out,
	}
	f.listen("run/erofsd/erofsd.sock")
	f.listen("run/containerd-erofsd/containerd-erofsd-grpc.sock")
	return f
}

// shortDir is a directory for sockets, whose paths are short.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "n")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (f *fakeNode) write(name, text string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeNode) read(name string) string {
	text, err := os.ReadFile(filepath.Join(f.dir, name))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// listen answers every request at a socket of the node.
func (f *fakeNode) listen(name string) {
	f.t.Helper()
	path := filepath.Join(f.dir, "node", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	serveUnix(f.t, path, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) })
}

// serveUnix serves HTTP at a socket until t ends.
func serveUnix(t *testing.T, path string, h http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s, done := &http.Server{Handler: h}, make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // it is closed
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
}

func (f *fakeNode) tell(_ context.Context, args ...string) (string, error) {
	line := strings.Join(args, " ")
	if args[0] == "is-active" {
		if !f.active[args[1]] {
			return "inactive", errors.New("inactive")
		}
		return "active", nil
	}
	f.told = append(f.told, line)
	if f.broken != "" && strings.HasPrefix(line, f.broken) {
		return "", errors.New("systemctl " + line + ": it is broken")
	}
	if args[0] == "start" {
		f.active[args[1]] = true
	}
	return "", nil
}

// installs installs, and compares what systemd was told.
func (f *fakeNode) installs(want ...string) {
	f.t.Helper()
	f.told = nil
	if err := f.install(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
	if !slices.Equal(f.told, want) {
		f.t.Errorf("systemctl was told %q, want %q", f.told, want)
	}
}

// TestNodeInstall: the first time everything is placed and started; then only what has
// changed is replaced, and nothing that containers use is ended.
func TestNodeInstall(t *testing.T) {
	const enable = "enable " + daemonUnit + " " + snapshotterUnit
	startBoth := []string{"start " + daemonUnit, "start " + snapshotterUnit}
	f := newFakeNode(t)
	f.installs(append([]string{"daemon-reload", enable}, startBoth...)...)
	for name, want := range map[string]string{
		"node/etc/systemd/system/erofsd.service":                                "FileDescriptorStoreMax",
		"node/etc/systemd/system/erofsd.service.d/10-node.conf":                 "ExecStart=/opt/erofsd/bin/erofsd --transport fanotify --config /etc/erofsd/erofsd.toml\n",
		"node/etc/systemd/system/containerd-erofsd-grpc.service":                "KillMode=process",
		"node/etc/systemd/system/containerd-erofsd-grpc.service.d/10-node.conf": "After=erofsd.service\n",
		"node/opt/erofsd/bin/erofsctl":                                          "#!/bin/sh",
		"node/etc/erofsd/containerd-erofsd.toml":                                "connect",
	} {
		if got := f.read(name); !strings.Contains(got, want) {
			t.Errorf("%s: no %q in %q", name, want, got)
		}
	}
	if info, err := os.Stat(filepath.Join(f.dir, "node/etc/erofsd/erofsd.toml")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the configuration is for everybody: %v, %v", info, err)
	}
	f.installs(append([]string{enable}, startBoth...)...)

	f.write("pod/bin/erofsd", "#!/bin/sh\nexit 0 # next\n")
	f.installs(enable, "reload "+daemonUnit, "start "+snapshotterUnit)
	f.write("pod/etc/containerd-erofsd.toml", "[daemon]\nmode = \"connect\"\n[log]\nlevel = \"debug\"\n")
	f.installs(enable, "start "+daemonUnit, "restart "+snapshotterUnit)
	f.write("pod/bin/erofsctl", "#!/bin/sh\nexit 0 # next\n")
	f.installs(append([]string{enable}, startBoth...)...)

	f.dropIn = "/etc/containerd/conf.d/erofsd.toml"
	f.installs(append([]string{enable}, startBoth...)...)
	if got := f.read("node/etc/containerd/conf.d/erofsd.toml"); !strings.Contains(got, "[proxy_plugins.erofsd]") || !strings.Contains(f.out.String(), "after its next restart") {
		t.Errorf("%q, said %q", got, f.out.String())
	}
	f.restart = true
	f.installs(append([]string{enable}, startBoth...)...) // it has not changed
	f.write("node/etc/containerd/conf.d/erofsd.toml", "old")
	f.installs(append(append([]string{enable}, startBoth...), "restart containerd.service")...)
	if left, err := filepath.Glob(filepath.Join(f.dir, "node/*/*/.*.new")); err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
}

// TestNodeInstallRefused: what cannot work is refused before anything is changed.
func TestNodeInstallRefused(t *testing.T) {
	for _, test := range []struct {
		name, want string
		spoil      func(f *fakeNode)
	}{
		{"no systemd", "without systemd", func(f *fakeNode) { os.RemoveAll(filepath.Join(f.dir, "node/run/systemd")) }},
		{"kernel", "no such feature", func(f *fakeNode) { f.probe = func(string) error { return errors.New("no such feature") } }},
		{"configuration", "bad key", func(f *fakeNode) { f.write("pod/bin/containerd-erofsd-grpc", "#!/bin/sh\necho bad key; exit 1\n") }},
		{"containerd 1", "has version 2", func(f *fakeNode) {
			f.dropIn = "/etc/containerd/conf.d/erofsd.toml"
			f.write("node/etc/containerd/config.toml", "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n")
		}},
		{"not imported", "does not import", func(f *fakeNode) { f.dropIn = "/etc/elsewhere/erofsd.toml" }},
		{"unreadable", "containerd's configuration", func(f *fakeNode) {
			f.dropIn = "/etc/containerd/conf.d/erofsd.toml"
			f.write("node/etc/containerd/config.toml", "version = [")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFakeNode(t)
			test.spoil(f)
			if err := f.install(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("want an error with %q, got %v", test.want, err)
			}
			if _, err := os.Stat(filepath.Join(f.dir, "node/etc/erofsd")); !errors.Is(err, os.ErrNotExist) || len(f.told) > 0 {
				t.Errorf("something was done: %v, %q", err, f.told)
			}
		})
	}
}

// TestNodeInstallFails: an error of the node is told, and containerd is told nothing before
// the services answer.
func TestNodeInstallFails(t *testing.T) {
	f := newFakeNode(t)
	f.dropIn, f.broken = "/etc/containerd/conf.d/erofsd.toml", "start "+snapshotterUnit
	if err := f.install(t.Context()); err == nil || !strings.Contains(err.Error(), "it is broken") {
		t.Errorf("want systemd's error, got %v", err)
	}
	f.broken = ""
	if err := os.Remove(filepath.Join(f.dir, "node/run/containerd-erofsd/containerd-erofsd-grpc.sock")); err != nil {
		t.Fatal(err)
	}
	if err := f.install(t.Context()); err == nil || !strings.Contains(err.Error(), "journalctl -u containerd-erofsd-grpc") {
		t.Errorf("the snapshotter does not answer, got %v", err)
	}
	if got := f.read("node/etc/containerd/conf.d/erofsd.toml"); !strings.Contains(got, "no such file") {
		t.Errorf("containerd was told: %q", got)
	}
	if err := os.Symlink("/", filepath.Join(f.dir, "node/outside")); err != nil {
		t.Fatal(err)
	}
	f.bin = "/outside/bin" // the pod's own root, if it were followed
	if err := f.install(t.Context()); err == nil || !strings.Contains(err.Error(), "escapes") {
		t.Errorf("a link out of the node was followed: %v", err)
	}
}

// TestNodeRemove: everything goes, but not while containerd knows of snapshots.
func TestNodeRemove(t *testing.T) {
	f := newFakeNode(t)
	f.account, f.dropIn, f.restart = filepath.Join(f.dir, "pod/account"), "/etc/containerd/conf.d/erofsd.toml", true
	f.write("pod/account/token", "secret-token")
	f.write("pod/account/ca.crt", "certificate")
	t.Setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	if err := f.install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := f.read("node/etc/erofsd/kubernetes/kubeconfig"); !strings.Contains(got, `server: "https://[fd00::1]:443"`) {
		t.Error(got)
	}
	if got := f.read("node/etc/erofsd/kubernetes/token"); got != "secret-token" || strings.Contains(f.out.String(), "secret-token") {
		t.Errorf("the token is %q; said %q", got, f.out.String())
	}
	const snapshot = "node/var/lib/containerd/io.containerd.snapshotter.v1.erofsd/snapshots/7"
	f.write(snapshot+"/fs/a", "")
	f.told = nil
	if err := f.remove(t.Context()); err == nil || !strings.Contains(err.Error(), "1 snapshots") || len(f.told) > 0 {
		t.Fatalf("removed below containerd: %v, %q", err, f.told)
	}
	if err := os.RemoveAll(filepath.Join(f.dir, snapshot)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again there is nothing to do
		if err := f.remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"restart containerd.service", "disable --now " + snapshotterUnit + " " + daemonUnit, "daemon-reload", "daemon-reload"}
	if !slices.Equal(f.told, want) {
		t.Errorf("systemctl was told %q, want %q", f.told, want)
	}
	for _, dir := range []string{"etc/erofsd", "opt/erofsd/bin", "etc/systemd/system", "etc/containerd/conf.d"} {
		entries, err := os.ReadDir(filepath.Join(f.dir, "node", dir))
		if err != nil || len(entries) > 0 {
			t.Errorf("%s has %v, %v", dir, entries, err)
		}
	}
}

// TestNodeKeep: a token that the kubelet has renewed reaches the node, and the end comes when
// it is asked for.
func TestNodeKeep(t *testing.T) {
	f := newFakeNode(t)
	f.account = filepath.Join(f.dir, "pod/account")
	f.write("pod/account/token", "one")
	f.write("pod/account/ca.crt", "certificate")
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, token := range []string{"one", "two"} {
		f.write("pod/account/token", token)
		if err := f.keep(ended); err != nil {
			t.Fatal(err)
		}
		if got := f.read("node/etc/erofsd/kubernetes/token"); got != token {
			t.Errorf("the node has %q, want %q", got, token)
		}
	}
	f.account = filepath.Join(f.dir, "nowhere")
	if err := f.keep(ended); err != nil || !strings.Contains(f.out.String(), "warning: copy the service account") {
		t.Errorf("%v, said %q", err, f.out.String())
	}
}
