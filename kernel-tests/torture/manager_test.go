package torture

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/daemon"
)

// A serviceManager keeps descriptors for a keeper as systemd does.
type serviceManager struct {
	t    *testing.T
	conn *net.UnixConn
	done chan struct{}

	mu     sync.Mutex // guards what follows
	names  []string
	files  []*os.File
	marker int // the last that was read
}

func newServiceManager(t *testing.T) *serviceManager {
	t.Helper()
	path := filepath.Join(scratch(t), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	s := &serviceManager{t: t, conn: conn, done: make(chan struct{})}
	go s.serve()
	t.Cleanup(func() {
		conn.Close()
		<-s.done
		s.drop()
	})
	return s
}

// drop lets go of everything, as when the service is stopped.
func (s *serviceManager) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		f.Close()
	}
	s.files, s.names = nil, nil
}

func (s *serviceManager) serve() {
	defer close(s.done)
	p, oob := make([]byte, 4096), make([]byte, 256)
	for {
		n, oobn, _, _, err := s.conn.ReadMsgUnix(p, oob)
		if err != nil {
			return // closed
		}
		var fds []int
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		for k := range messages {
			var some []int
			some, err = unix.ParseUnixRights(&messages[k])
			fds = append(fds, some...)
		}
		if err != nil {
			s.t.Error(err)
		}
		s.take(string(p[:n]), fds)
	}
}

// take does what a message says.
func (s *serviceManager) take(text string, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, name, _ := strings.Cut(text, "FDNAME=")
	name, _, _ = strings.Cut(name, "\n")
	if strings.HasPrefix(text, "FDSTOREREMOVE=1") {
		for k := slices.Index(s.names, name); k >= 0; k = slices.Index(s.names, name) {
			s.files[k].Close()
			s.files, s.names = slices.Delete(s.files, k, k+1), slices.Delete(s.names, k, k+1)
		}
	}
	for _, fd := range fds {
		if slices.ContainsFunc(s.files, func(f *os.File) bool { return sameOpenFile(int(f.Fd()), fd) }) {
			unix.Close(fd) // it keeps an open file only once
			continue
		}
		s.files, s.names = append(s.files, os.NewFile(uintptr(fd), name)), append(s.names, name)
	}
	_, _ = fmt.Sscanf(text, "marker %d", &s.marker)
}

func sameOpenFile(a, b int) bool {
	pid := uintptr(os.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, 0, uintptr(a), uintptr(b), 0)
	return errno == 0 && order == 0
}

// hear waits until everything that was sent has been taken.
func (s *serviceManager) hear() {
	s.t.Helper()
	c, err := net.Dial("unixgram", s.conn.LocalAddr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	s.mu.Lock()
	next := s.marker + 1
	s.mu.Unlock()
	if _, err := fmt.Fprintf(c, "marker %d", next); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		heard := s.marker == next
		s.mu.Unlock()
		if heard {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal("the service manager hears nothing")
		}
	}
}

// start starts a keeper in dir with what is kept, and returns how much that is.
func (s *serviceManager) start(dir string, o daemon.Options) (m *machine, kept int) {
	s.t.Helper()
	s.hear()
	s.mu.Lock()
	files, names := slices.Clone(s.files), strings.Join(s.names, ":")
	s.mu.Unlock()
	return startAs(s.t, dir, o, func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Environ(), "NOTIFY_SOCKET="+s.conn.LocalAddr().String(),
			"LISTEN_PID=self", fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+names)
		cmd.ExtraFiles = files
	}), len(files)
}

// TestServiceManager kills keeper and worker at once below readers, twice in a row, where a
// service manager keeps what they held: nobody may notice.
func TestServiceManager(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one := newImage(t, seed, 120, "zstd")
	r := rand.New(rand.NewPCG(seed, 0))
	for range rounds(t, 3) {
		o := daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true}
		manager := newServiceManager(t)
		m, _ := manager.start(scratch(t), o)
		point := m.mount(one, "one")
		s := &score{}
		wait := s.readers(one, point, readersAtOnce, r.Uint64())
		for range 2 {
			time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond) // any moment will do
			t.Log("killed after ", s)
			m.killTogether()
			var kept int
			if m, kept = manager.start(m.dir, o); kept == 0 {
				t.Fatal("nothing was kept")
			}
		}
		wait(t, m)
		s.readers(one, point, 2, r.Uint64())(t, m) // and all is there afterwards
		m.unmount(point)
		m.stop()
		t.Log(s)
	}
}
