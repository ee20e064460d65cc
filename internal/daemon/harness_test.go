package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/testenv"
)

// patience is how long anything may take that has no limit of its own, on a machine with
// much else to do. Nothing waits that long when all is well.
const patience = time.Minute

// daemonName is argv[0] of a daemon under test. It runs in a process of its own, as it
// has to: the daemon lets its own reads through.
const daemonName = "erofsd-under-test"

func TestMain(m *testing.M) {
	switch {
	case IsHelper(os.Args):
		os.Exit(Helper(os.Args, os.Stdout))
	case IsGuard(os.Args):
		os.Exit(Guard(os.Args))
	case os.Args[0] == managedName:
		panic(runManaged())
	case os.Args[0] == daemonName:
		os.Exit(runDaemon(os.Args[1], os.Args[2]))
	}
	testenv.Main(m)
}

// runDaemon is a small copy of cmd/erofsd; options are Options in JSON.
func runDaemon(options, socket string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var o Options
	err := json.Unmarshal([]byte(options), &o)
	o.Logger, o.FillTimeout, o.Sandbox = log, 20*time.Second, SandboxAuto // without cgo
	if err == nil {
		o.Device, err = InheritedDevice()
	}
	var c *Control
	if err == nil {
		c, err = NewControl(o, socket)
	}
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		force, stopForce := signal.NotifyContext(context.Background(), syscall.SIGUSR1)
		defer stopForce()
		err = c.Run(ctx, force, socket)
	}
	if err != nil {
		log.Error("ended", "err", err)
		return 1
	}
	return 0
}

// testDaemon is a daemon in its own process with its own root.
type testDaemon struct {
	*api.Client
	root, socket string
	cmd          *exec.Cmd
	log          *testenv.Buffer
	ended        chan struct{}
}

type daemonOptions struct {
	root       string // "": a new one on a file system that can do it
	completion bool
	high, low  int64
	grace      time.Duration // of eviction
	handover   bool
	// start starts the daemon; nil: as a child of the test.
	start func(*exec.Cmd) error
}

// newRoot returns a directory for a daemon. It is not t.TempDir alone, because that may be a tmpfs.
func newRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(rootParent(), "erofsd-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// rootParent is $EROFSD_TEST_DIR or the default for temporary files.
func rootParent() string { return os.Getenv("EROFSD_TEST_DIR") }

// startDaemon starts a daemon and stops it, with all its mounts, after the test.
func startDaemon(t testing.TB, o daemonOptions) *testDaemon {
	t.Helper()
	testenv.Root(t)
	if o.root == "" {
		o.root = newRoot(t)
	}
	if o.start == nil {
		needTransport(t, o.root)
	}
	d := &testDaemon{root: o.root, socket: filepath.Join(o.root, "sock"), log: &testenv.Buffer{}, ended: make(chan struct{})}
	d.Client = api.NewClient(d.socket)
	d.cmd = exec.Command("/proc/self/exe")
	options, err := json.Marshal(Options{Root: d.root, NoCompletion: !o.completion, High: o.high, Low: o.low, Grace: o.grace, Handover: o.handover})
	if err != nil {
		t.Fatal(err)
	}
	d.cmd.Args = []string{daemonName, string(options), d.socket}
	d.cmd.Stderr = d.log
	d.cmd.WaitDelay = 100 * time.Millisecond // the guard may outlive it and holds the pipe
	if o.start == nil {
		o.start = (*exec.Cmd).Start
	}
	if err := o.start(d.cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.ended)
		_ = d.cmd.Wait() // how it ended is in its state
	}()
	t.Cleanup(func() { d.stop(t) })
	for start := time.Now(); ; {
		if _, err := d.Status(t.Context()); err == nil {
			return d
		}
		if time.Since(start) > patience {
			t.Fatalf("the daemon does not answer:\n%s", d.log)
		}
		select {
		case <-d.ended:
			t.Fatalf("the daemon ended:\n%s", d.log)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// needTransport skips t on a kernel that has neither transport.
func needTransport(t testing.TB, root string) {
	t.Helper()
	if err := fanotify.Supported(root); err != nil {
		cerr := cachefiles.Supported("", root)
		if cerr != nil && !errors.Is(cerr, kernel.ErrNotSupported) {
			t.Fatal(cerr)
		}
		if cerr != nil {
			testenv.Kernel(t, "fanotify", errors.Join(err, cerr))
		}
	}
}

// stop unmounts what is left and ends the daemon.
func (d *testDaemon) stop(t testing.TB) {
	t.Helper()
	defer d.Close()
	if st, err := d.Status(context.Background()); err == nil {
		for _, m := range st.Images {
			if m.Mountpoint != "" {
				_ = d.Unmount(context.Background(), api.UnmountRequest{Mountpoint: m.Mountpoint}) // looked at below
			}
		}
	}
	_ = d.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-d.ended:
	case <-time.After(patience):
		_ = d.cmd.Process.Kill()
		t.Errorf("the daemon did not end:\n%s", d.log)
	}
	if s := d.log.String(); strings.Contains(s, "panic:") || strings.Contains(s, "DATA RACE") {
		t.Errorf("the daemon's log:\n%s", s)
	}
}

// kill ends the daemon as a crash does.
func (d *testDaemon) kill() {
	_ = d.cmd.Process.Kill()
	<-d.ended
}

// mount mounts r's image at a new directory, which it returns; it is unmounted after the test.
func (d *testDaemon) mount(t testing.TB, r api.MountRequest) string {
	t.Helper()
	r.Mountpoint = newMountpoint(t)
	if _, err := d.Mount(t.Context(), r); err != nil {
		t.Fatalf("%v\n%s", err, d.log)
	}
	return r.Mountpoint
}

func newMountpoint(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "erofsd-mnt-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Unmount(dir, syscall.MNT_DETACH) // usually done already
		os.Remove(dir)
	})
	return dir
}

func (d *testDaemon) umount(t testing.TB, mountpoint string) {
	t.Helper()
	if err := d.Unmount(t.Context(), api.UnmountRequest{Mountpoint: mountpoint}); err != nil {
		t.Fatalf("%v\n%s", err, d.log)
	}
}

// image returns the status of the image at mountpoint.
func (d *testDaemon) image(t testing.TB, mountpoint string) api.Mount {
	t.Helper()
	st, err := d.Status(t.Context())
	if err != nil {
		t.Fatalf("%v\n%s", err, d.log)
	}
	for _, m := range st.Images {
		if m.Mountpoint == mountpoint {
			return m
		}
	}
	t.Fatalf("no image at %s in %+v", mountpoint, st)
	return api.Mount{}
}

// await polls until ok, and fails the test when it takes too long.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited too long for: %s", what)
		}
	}
}

// readAll returns what can be read of name, and the error that ended it.
func readAll(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(f)
	return p, err
}

func isEIO(err error) bool { return errors.Is(err, syscall.EIO) }

// compareTree reads everything below dir and compares it with tree.
func compareTree(t testing.TB, tree testenv.Tree, dir string) {
	t.Helper()
	got, err := testenv.ScanTree(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	tree.Compare(t, got, false)
}

// fixtureList is tree.jsonl as the fixtures' images have it: nydus-image gave
// their root no mtime.
func fixtureList(t testing.TB) testenv.Tree {
	t.Helper()
	tree := testenv.LoadTree(t, "tree.jsonl")
	root := tree["."]
	root.Mtime = 0
	tree["."] = root
	return tree
}
