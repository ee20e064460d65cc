package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/erofsd/erofsd/internal/api"
	erofsd "github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/nydusd"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/regserver"
)

// hiddenName is argv[0] of an erofsd that has nydusd's API alone.
const hiddenName = "erofsd-without-its-own-api"

// isPart says that this process is no test but a part of one.
func isPart(args []string) bool {
	return nydusd.IsHelper(args) || erofsd.IsHelper(args) || erofsd.IsGuard(args) || args[0] == hiddenName
}

// part runs such a process and returns its exit code.
func part(args []string) int {
	switch {
	case nydusd.IsHelper(args):
		return nydusd.Helper(args, os.Stdout)
	case erofsd.IsHelper(args):
		return erofsd.Helper(args, os.Stdout)
	case erofsd.IsGuard(args):
		return erofsd.Guard(args)
	}
	if err := hidden(args[1], args[2], args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// hidden is erofsd singleton with a socket at which its own routes do not exist. Its command
// line has the directory of the cache where nydusd's has it.
func hidden(root, socket, fscache string) error {
	fscache = strings.TrimPrefix(fscache, "--fscache=")
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	o := erofsd.Options{Root: root, Fscache: fscache, Hasty: true, NoCompletion: true, Logger: log, Transport: erofsd.Cachefiles}
	if fscache == "" {
		o.Transport = erofsd.Fanotify
	}
	inner := filepath.Join(root, "inner.sock")
	c, err := erofsd.NewControl(o, inner)
	if err != nil {
		return err
	}
	to := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "erofsd" },
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", inner)
		}},
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // until the process ends
		if strings.HasPrefix(r.URL.Path, api.Prefix) {
			http.NotFound(w, r)
			return
		}
		to.ServeHTTP(w, r)
	}))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return c.Run(ctx, context.Background(), inner)
}

// A nydusdWorld is the snapshotter, in this process, and a nydusd that it is to find.
type nydusdWorld struct {
	dir       string
	registry  *guardedRegistry // with the images' data, at host
	host      string
	tree      testenv.Tree
	command   func() *exec.Cmd // starts nydusd
	cmd       *exec.Cmd        // nil: it does not run
	log       testenv.Buffer
	configure func(*config)

	sn   snapshots.Snapshotter
	stop func() // of the snapshotter
}

func newNydusdWorld(t *testing.T) *nydusdWorld {
	t.Helper()
	testenv.Root(t)
	dir, err := os.MkdirTemp("", "nydusd-*") // short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		for _, m := range slices.Backward(left) {
			err = errors.Join(err, mount.UnmountAll(m.Mountpoint, syscall.MNT_DETACH))
		}
		if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	w := &nydusdWorld{dir: dir, tree: testenv.LoadTree(t, "tree.jsonl"), configure: func(*config) {}}
	for _, name := range []string{"registry/blobs", "fscache", "fuse", "erofsd"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{goodImage, badImage} {
		if err := os.CopyFS(filepath.Join(dir, "registry/blobs"), os.DirFS(filepath.Join(testenv.Fixtures(t), name, "blobs"))); err != nil {
			t.Fatal(err)
		}
	}
	reg, err := regserver.New(filepath.Join(dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	w.registry = &guardedRegistry{next: reg}
	server := httptest.NewServer(w.registry)
	w.host = strings.TrimPrefix(server.URL, "http://")
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		w.end()
		w.kill(t)
	})
	return w
}

// asErofsd has our own daemon behind nydusd's API.
func (w *nydusdWorld) asErofsd(fscache string) func() *exec.Cmd {
	return func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Args = []string{hiddenName, filepath.Join(w.dir, "erofsd"), w.socket(), "--fscache=" + fscache}
		return cmd
	}
}

// asNydusd has nydusd itself.
func (w *nydusdWorld) asNydusd(program string) func() *exec.Cmd {
	return func() *exec.Cmd {
		return exec.Command(program, "singleton", "--rlimit-nofile", "0", "--fscache", filepath.Join(w.dir, "fscache"), "--apisock", w.socket())
	}
}

// asFuse has nydusd itself, with FUSE.
func (w *nydusdWorld) asFuse(program string) func() *exec.Cmd {
	root, link := filepath.Join(w.dir, "fuse"), filepath.Join(w.dir, "link")
	return func() *exec.Cmd {
		_ = os.Symlink(w.dir, link)                   // the second time it is there
		_ = syscall.Unmount(root, syscall.MNT_DETACH) // of one that was killed
		return exec.Command(program, "fuse", "--rlimit-nofile", "0", "--mountpoint", filepath.Join(link, "fuse"), "--apisock", w.socket())
	}
}

func (w *nydusdWorld) socket() string { return filepath.Join(w.dir, "api.sock") }

// run starts nydusd, which a snapshotter that runs finds by itself.
func (w *nydusdWorld) run(t *testing.T) {
	t.Helper()
	os.Remove(w.socket()) // of one that was killed
	w.cmd = w.command()
	w.cmd.Stdout, w.cmd.Stderr = &w.log, &w.log
	w.cmd.WaitDelay = time.Second // a guard has its output too
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (w *nydusdWorld) kill(t *testing.T) {
	t.Helper()
	if w.cmd == nil {
		return
	}
	if err := w.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = w.cmd.Wait() // it was killed
	w.cmd = nil
}

// start starts the snapshotter.
func (w *nydusdWorld) start(t *testing.T) {
	t.Helper()
	c := defaultConfig()
	c.Root, c.Address, c.System.Address = filepath.Join(w.dir, "root"), filepath.Join(w.dir, "grpc.sock"), filepath.Join(w.dir, "system.sock")
	c.Containerd.Address, c.Backend.PlainHTTP, c.Backend.Credentials = "", []string{w.host}, ""
	c.Daemon.Mode, c.Daemon.Socket = modeConnect, w.socket()
	w.configure(&c)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, c, nil, slog.New(slog.NewTextHandler(&w.log, nil))) }()
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	w.sn = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "erofsd")
	w.stop = func() {
		cancel()
		if err := errors.Join(conn.Close(), <-ended); err != nil {
			t.Error(err)
		}
		w.stop = nil
	}
}

// end ends the snapshotter.
func (w *nydusdWorld) end() {
	if w.stop != nil {
		w.stop()
	}
}

// pull does what containerd does with an image, and returns its name.
func (w *nydusdWorld) pull(t *testing.T, name string) string {
	t.Helper()
	b := &badWorld{sn: w.sn}
	top, err := b.pull(t.Context(), name, w.host+"/team/"+name+":1", fixture(t, name))
	if err != nil {
		t.Fatalf("pull %s: %v", name, err)
	}
	return top
}

// container mounts one of an image and returns where.
func (w *nydusdWorld) container(t *testing.T, key, top string) string {
	t.Helper()
	mounts, err := w.sn.Prepare(t.Context(), key, top)
	if err != nil {
		t.Fatalf("prepare %s: %v; the log:\n%s", key, err, w.log.String())
	}
	dir := filepath.Join(w.dir, "run", key)
	if err := errors.Join(os.MkdirAll(dir, 0o755), mount.All(mounts, dir)); err != nil {
		t.Fatalf("%+v: %v", mounts, err)
	}
	return dir
}

// remove ends containers.
func (w *nydusdWorld) remove(t *testing.T, keys ...string) {
	t.Helper()
	for _, key := range keys {
		if err := errors.Join(mount.UnmountAll(filepath.Join(w.dir, "run", key), 0), w.sn.Remove(t.Context(), key)); err != nil {
			t.Error(err)
		}
	}
}

// reads compares every byte below dir.
func (w *nydusdWorld) reads(t *testing.T, dir string) {
	t.Helper()
	got, err := testenv.ScanTree(dir, true)
	if err != nil {
		t.Fatalf("%v; the log:\n%s", err, w.log.String())
	}
	w.tree.Compare(t, got, false)
}

// status is what the system API says of the daemon.
func (w *nydusdWorld) status(t *testing.T) (list []daemonInfo) {
	t.Helper()
	status, body := get(t, "unix", filepath.Join(w.dir, "system.sock"), "/api/v1/daemons")
	if err := json.Unmarshal([]byte(body), &list); err != nil || status != 200 {
		t.Fatalf("daemons: %d %s", status, body)
	}
	return list
}

// left is what of a file name pattern is there.
func (w *nydusdWorld) left(t *testing.T, patterns ...string) (names []string) {
	t.Helper()
	for _, p := range patterns {
		some, err := filepath.Glob(filepath.Join(w.dir, p))
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, some...)
	}
	slices.Sort(names)
	return names
}
