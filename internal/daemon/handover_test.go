package daemon

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A manager is a service manager as systemd is one: it keeps the descriptor that it is
// sent and starts the next daemon with it.
type manager struct {
	t      *testing.T
	conn   *net.UnixConn
	device *os.File
}

func newManager(t *testing.T) *manager {
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, conn: c}
	t.Cleanup(func() {
		c.Close()
		if m.device != nil {
			m.device.Close()
		}
	})
	return m
}

// start starts a daemon with what is kept, and takes what it sends.
func (m *manager) start(cmd *exec.Cmd) error {
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.conn.LocalAddr().String())
	if m.device != nil {
		cmd.Args = append([]string{managedName}, cmd.Args...)
		cmd.Env = append(cmd.Env, "LISTEN_FDS=1", "LISTEN_FDNAMES=cachefiles")
		cmd.ExtraFiles = []*os.File{m.device}
	}
	return cmd.Start()
}

// managedName is argv[0] of a process that becomes the daemon whose arguments follow: it
// alone knows the process id that LISTEN_PID must have.
const managedName = "erofsd-managed"

func runManaged() error {
	env := append(os.Environ(), "LISTEN_PID="+strconv.Itoa(os.Getpid()))
	return syscall.Exec("/proc/self/exe", os.Args[1:], env)
}

// await returns when the daemon says that it serves, with the device if it sends it.
func (m *manager) await(d *testDaemon) {
	m.t.Helper()
	for ready, sent := false, false; !ready || !sent; {
		p, oob := make([]byte, 1024), make([]byte, 1024)
		_ = m.conn.SetReadDeadline(time.Now().Add(patience))
		n, oobn, _, _, err := m.conn.ReadMsgUnix(p, oob)
		if err != nil {
			m.t.Fatalf("the daemon sends nothing: %v\n%s", err, d.log)
		}
		ready = ready || strings.Contains(string(p[:n]), "READY=1")
		if !strings.Contains(string(p[:n]), "FDSTORE=1") {
			continue
		}
		messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			m.t.Fatalf("%d control messages: %v", len(messages), err)
		}
		fds, err := syscall.ParseUnixRights(&messages[0])
		if err != nil || len(fds) != 1 {
			m.t.Fatalf("%d descriptors: %v", len(fds), err)
		}
		syscall.CloseOnExec(fds[0])
		sent = true
		if m.device != nil { // it is the same
			m.device.Close()
		}
		m.device = os.NewFile(uintptr(fds[0]), "device")
	}
}

// TestHandover: with the device kept by the service manager a daemon may end, or be
// killed, and start again, and the mounts and the reads under way never notice.
func TestHandover(t *testing.T) {
	root := newRoot(t)
	testenv.Root(t)
	testenv.Kernel(t, "cachefiles", cachefiles.Supported("", root))
	m := newManager(t)
	d := startDaemon(t, daemonOptions{root: root, handover: true, start: m.start})
	m.await(d)
	r := localRequest(t, "zstd")
	point := d.mount(t, r)
	big := filepath.Join(point, "big/rand-2m")
	// A read under way while the daemon is stopped, then killed.
	if err := d.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := readAll(big)
		read <- err
	}()
	select {
	case err := <-read:
		t.Fatal("a read without the daemon ended:", err)
	case <-time.After(300 * time.Millisecond):
	}
	d.kill()
	d.Close()
	d = startDaemon(t, daemonOptions{root: root, handover: true, start: m.start})
	m.await(d)
	if err := <-read; err != nil {
		t.Fatalf("the read under way: %v\n%s", err, d.log)
	}
	compareTree(t, fixtureList(t), point)

	// An orderly end leaves the mount as well.
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-d.ended
	d.Close()
	d = startDaemon(t, daemonOptions{root: root, handover: true, start: m.start})
	m.await(d)
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o600); err != nil {
		t.Fatal(err)
	}
	compareTree(t, fixtureList(t), point)
	if s := d.image(t, point); s.BackendRequests != 0 {
		t.Errorf("what is in the cache was fetched again: %+v", s)
	}
	d.umount(t, point)
	point = d.mount(t, r)
	compareTree(t, fixtureList(t), point)
	d.umount(t, point)
}
