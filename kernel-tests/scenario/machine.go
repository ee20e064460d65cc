package scenario

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

const (
	cachefilesTransport = daemon.Cachefiles
	fanotifyTransport   = daemon.Fanotify
)

// patience is how long anything may take that has no limit of its own. A guest's
// processors are emulated.
const patience = 30 * time.Second

// A config says how a machine's daemon runs.
type config struct {
	completion  bool
	small       bool // the cache is on a disk that can be filled
	held        bool // cachefiles: somebody holds the device between daemons
	fillTimeout time.Duration
	root        string // of another machine that has ended; "": a new one
}

// A machine is a daemon on a kernel, and whoever reads its images. It ends with the
// test, and must have ended in order then.
type machine struct {
	*api.Client
	row          Row
	root, socket string
	driver       driver
	points       []string // where something was mounted
	ended        bool
}

// A driver is what differs between a real and a fake kernel. Its methods are called
// by one goroutine at a time, but for view.
type driver interface {
	// start starts a daemon; it need not answer yet.
	start(t testing.TB)
	// stop asks the daemon to end in order; kill ends it at once. Both wait.
	stop(t testing.TB)
	kill(t testing.TB)
	// failed says why the daemon ended by itself, nil while it runs.
	failed() error
	log() string
	// killMounting kills the daemon while the mount that mount asks for is in the
	// kernel's hands, with cachefiles in the middle of an OPEN. unmount undoes a mount
	// that was too fast for this.
	killMounting(t testing.TB, mount func() error, unmount func())
	// view shows what is mounted at a place.
	view(point string) fileSystem
	// abandon unmounts what is at a place, also when it is in use, behind the
	// daemon's back.
	abandon(point string) error
	// fill leaves no room in the cache until empty.
	fill(t testing.TB)
	empty(t testing.TB)
}

// A fileSystem is a mounted image as its readers see it. Names are relative to its
// root. Errors hold an errno.
type fileSystem interface {
	tree() (testenv.Tree, error)
	open(name string) (file, error)
	// mapped returns a file as a private mapping shows it, by page faults.
	mapped(name string) ([]byte, error)
	// run executes a program.
	run(name string) error
}

type file interface {
	ReadAt(p []byte, off int64) (int, error)
	Close() error
}

// start starts a machine with one daemon, or skips the test where the row cannot run.
func (r Row) start(t testing.TB, c config) *machine {
	t.Helper()
	if c.fillTimeout == 0 {
		c.fillTimeout = 20 * time.Second
	}
	r.need(t)
	if c.held {
		serviceManager(t)
	}
	root := c.root
	switch {
	case root != "":
	case c.small:
		root = filepath.Join(r.smallDisk(t), "root")
	default:
		root = filepath.Join(scratch(t), "root")
	}
	if err := os.Mkdir(root, 0o700); err != nil && c.root == "" {
		t.Fatal(err)
	}
	m := &machine{row: r, root: root, socket: filepath.Join(root, "sock")}
	m.Client = api.NewClient(m.socket)
	if r.Fake {
		m.driver = newInProcess(t, r, c, m.root, m.socket)
	} else {
		m.driver = newProcess(t, r, c, m.root, m.socket)
	}
	m.begin(t)
	return m
}

// need skips t, or fails it where the row must run, unless this kernel has what the
// row is about.
func (r Row) need(t testing.TB) {
	t.Helper()
	if r.Fake {
		return
	}
	testenv.Root(t)
	dir := scratch(t)
	if r.Transport == cachefilesTransport {
		testenv.Kernel(t, "cachefiles", cachefiles.Supported("", dir))
		return
	}
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
}

// serviceManager listens where a daemon that is to hand over its device wants somebody.
// What it sends lies there until the end of the test: the device as well.
func serviceManager(t testing.TB) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", socket)
}

// scratch returns a new directory on a file system that can hold a cache: in
// $EROFSD_TEST_DIR, else where temporary files are.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("EROFSD_TEST_DIR"), "erofsd-scenario-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// begin starts a daemon and waits until it answers. One that has to wait until its
// predecessor's guard lets go of the root is started again.
func (m *machine) begin(t testing.TB) {
	t.Helper()
	m.driver.start(t)
	t.Cleanup(func() { m.end(t) }) // before what the driver has just opened is closed
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := m.Status(t.Context()); err == nil {
			return
		}
		err := m.driver.failed()
		if time.Since(start) > patience || err != nil && !strings.Contains(err.Error()+m.driver.log(), "in use") {
			t.Fatalf("the daemon does not answer: %v\n%s", err, m.driver.log())
		}
		if err != nil {
			m.driver.start(t)
		}
	}
}

// end unmounts what is left and ends the daemon, once.
func (m *machine) end(t testing.TB) {
	t.Helper()
	if m.ended {
		return
	}
	m.ended = true
	defer m.Close()
	for _, i := range m.images(t) {
		if i.Mountpoint != "" {
			if err := m.Unmount(context.WithoutCancel(t.Context()), api.UnmountRequest{Mountpoint: i.Mountpoint}); err != nil {
				t.Error(err)
			}
		}
	}
	m.driver.stop(t)
	for _, p := range m.points {
		_ = m.driver.abandon(p) // usually there is nothing any more
		os.Remove(p)
	}
	if s := m.driver.log(); strings.Contains(s, "panic:") || strings.Contains(s, "DATA RACE") || t.Failed() {
		t.Errorf("the daemon's log:\n%s", tail(s, 8000))
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// point makes a place to mount at.
func (m *machine) point(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "erofsd-mnt-*")
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.points = append(m.points, dir)
	return dir
}

// mount mounts an image at a new place and returns how it looks.
func (m *machine) mount(t testing.TB, r api.MountRequest) (point string, fs fileSystem) {
	t.Helper()
	r.Mountpoint = m.point(t)
	if _, err := m.Mount(t.Context(), r); err != nil {
		t.Fatalf("%v\n%s", err, m.driver.log())
	}
	return r.Mountpoint, m.driver.view(r.Mountpoint)
}

func (m *machine) umount(t testing.TB, point string) {
	t.Helper()
	if err := m.Unmount(t.Context(), api.UnmountRequest{Mountpoint: point}); err != nil {
		t.Fatalf("%v\n%s", err, m.driver.log())
	}
}

// umountAll unmounts everything and waits until the images are closed.
func (m *machine) umountAll(t testing.TB, points ...string) {
	t.Helper()
	for _, p := range points {
		m.umount(t, p)
	}
	m.awaitClosed(t)
}

func (m *machine) awaitClosed(t testing.TB) {
	t.Helper()
	await(t, "the images to be closed", func() bool { return len(m.images(t)) == 0 })
}

// awaitComplete waits until the image at a place needs nobody any more. That is a little
// after the last read.
func (m *machine) awaitComplete(t testing.TB, point string) {
	t.Helper()
	await(t, "the image to be complete", func() bool { return m.image(t, point).Complete })
}

// images are those in the daemon's status.
func (m *machine) images(t testing.TB) []api.Mount {
	t.Helper()
	st, err := m.Status(context.WithoutCancel(t.Context())) // also at the end of the test
	if err != nil {
		t.Errorf("%v\n%s", err, m.driver.log())
	}
	return st.Images
}

// image is the status of the image at a place; "": of one that is only used still.
func (m *machine) image(t testing.TB, point string) api.Mount {
	t.Helper()
	list := m.images(t)
	for _, i := range list {
		if i.Mountpoint == point {
			return i
		}
	}
	t.Fatalf("no image at %q in %+v", point, list)
	return api.Mount{}
}

// await polls until ok.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited too long for: %s", what)
		}
	}
}

// compare reads everything and compares it.
func compare(t testing.TB, want testenv.Tree, fs fileSystem) {
	t.Helper()
	got, err := fs.tree()
	if err != nil {
		t.Fatal(err)
	}
	want.Compare(t, got, false)
}

// readFile returns what could be read of a file, and the error that ended it.
func readFile(fs fileSystem, name string, size int) (p []byte, err error) {
	f, err := fs.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const window = 128 << 10
	for p = make([]byte, 0, size); len(p) < size; {
		n, err := f.ReadAt(p[len(p):min(size, len(p)+window)], int64(len(p)))
		p = p[:len(p)+n]
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// isFailure says that a read failed as reads do for want of data: the kernel's own
// errno, and 6.12's for a cache that is dead (kernel-protocols 1.8).
func isFailure(err error) bool { return errors.Is(err, unix.EIO) || errors.Is(err, syscall.ENOBUFS) }
