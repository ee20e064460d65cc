package fdstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// envService has the test binary be a service, which tells what it was given.
const envService = "FDSTORE_TEST_SERVICE"

func TestMain(m *testing.M) {
	if IsStarter(os.Args) {
		fmt.Fprintln(os.Stderr, Become(os.Args))
		os.Exit(1)
	}
	if os.Getenv(envService) != "" {
		os.Exit(service())
	}
	testenv.Main(m)
}

// service prints the names and contents of what it was given, in order.
func service() int {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		fmt.Println("LISTEN_PID is", os.Getenv("LISTEN_PID"))
		return 1
	}
	for i, name := range strings.Split(os.Getenv("LISTEN_FDNAMES"), ":") {
		f := os.NewFile(uintptr(firstFD+i), name)
		text, err := io.ReadAll(io.NewSectionReader(f, 0, 100))
		fmt.Println(name, string(text), err)
	}
	fmt.Println(os.Getenv("WATCHDOG_USEC"), os.Args[1:])
	return 0
}

// A client speaks as a service does.
type client struct {
	t *testing.T
	c *net.UnixConn
}

func dial(t *testing.T, path string) client {
	t.Helper()
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return client{t, c}
}

func (c client) say(text string) {
	c.t.Helper()
	if err := send(c.c, text, nil); err != nil {
		c.t.Fatal(err)
	}
}

// store has a file with a text kept.
func (c client) store(name, text string) {
	c.t.Helper()
	f, err := os.Create(filepath.Join(c.t.TempDir(), "f"))
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err == nil {
		err = sendFile(c.c, "FDSTORE=1\nFDNAME="+name+"\nFDPOLL=0\n", f)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		c.t.Fatal(err)
	}
}

func open(t *testing.T, o Options) *Store {
	t.Helper()
	o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return s
}

func (s *Store) sync(t *testing.T) {
	t.Helper()
	if err := s.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// start starts a service and returns what it prints.
func (s *Store) startService(t *testing.T, args ...string) string {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), envService+"=1")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := s.Start(cmd, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	return out.String()
}

// TestStore keeps, replaces and removes; the service has what is there when it starts.
func TestStore(t *testing.T) {
	s := open(t, Options{Path: filepath.Join(t.TempDir(), "notify")})
	c := dial(t, s.path)
	c.store("b", "two")
	c.store("a", "one")
	c.store("gone", "none")
	c.store("a", "other")
	c.say("FDSTOREREMOVE=1\nFDNAME=gone\n")
	c.say("READY=1")
	if !s.Beat().IsZero() {
		t.Error("there was a sign of life")
	}
	before := time.Now()
	c.say("WATCHDOG=1")
	s.sync(t)
	if b := s.Beat(); b.Before(before) {
		t.Errorf("the last sign of life was at %v, want after %v", b, before)
	}
	for range 2 {
		want := "a other <nil>\nb two <nil>\n60000000 [x --y]\n"
		if got := s.startService(t, "x", "--y"); got != want {
			t.Errorf("the service was given\n%swant\n%s", got, want)
		}
	}
	fd, err := s.Main()
	if err != nil || fd < 0 {
		t.Fatal(fd, err)
	}
	if err := unix.PidfdSendSignal(fd, 0, nil, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the main process is not the one that has ended: %v", err)
	}
	unix.Close(fd)
	if !s.Beat().IsZero() {
		t.Error("the next one has to give a sign of its own")
	}
	s.Forget()
	if n := s.Len(); n != 0 {
		t.Errorf("%d are kept after all was forgotten", n)
	}
}

// TestRefused sends what is not taken, which must not leave a descriptor (TestMain counts).
func TestRefused(t *testing.T) {
	s := open(t, Options{Path: filepath.Join(t.TempDir(), "notify")})
	c := dial(t, s.path)
	for _, name := range []string{"", "a:b", "a b", strings.Repeat("x", 256), mainName, socketName, "\x00", "ä"} {
		c.store(name, "text")
	}
	c.say("FDSTORE=1\nFDNAME=nothing")
	c.say("")
	c.say("FDSTOREREMOVE=1\nFDNAME=unknown")
	c.say(strings.Repeat("A=B\n", 4000))
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := sendFile(c.c, "what=1", f); err != nil {
		t.Fatal(err)
	}
	s.sync(t)
	if n := s.Len(); n != 0 {
		t.Errorf("%d are kept", n)
	}
	st, err := os.Stat(s.path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v", st.Mode(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Sync(ctx); !errors.Is(err, context.Canceled) && err != nil {
		t.Errorf("who left waited: %v", err)
	}
}

// TestFull stores more names than one variable can have.
func TestFull(t *testing.T) {
	s := open(t, Options{Path: filepath.Join(t.TempDir(), "notify")})
	c := dial(t, s.path)
	for i := range maxNames/200 + 3 {
		c.store(fmt.Sprintf("%s-%d", strings.Repeat("x", 200), i), "")
		s.sync(t)
	}
	if n := s.Len(); n < 500 || n*201 > maxNames {
		t.Errorf("%d are kept", n)
	}
	c.say("FDSTOREREMOVE=1\nFDNAME=" + strings.Repeat("x", 200) + "-0\n")
	c.store("short", "")
	s.sync(t)
	if got := s.startService(t); !strings.Contains(got, "short") {
		t.Errorf("the service was not given what came when there was room again: %.100s", got)
	}
}

// TestSuccessor has a service manager keep everything for the next store: a client that is
// connected goes on, what it says meanwhile is heard, and what is kept is what was kept.
func TestSuccessor(t *testing.T) {
	systemd := testenv.NewManager(t)
	t.Setenv("NOTIFY_SOCKET", systemd.Path)
	m, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	path := filepath.Join(t.TempDir(), "notify")
	s := open(t, Options{Path: path, Manager: m})
	c := dial(t, path)
	c.store("a", "one")
	c.store("b", "two")
	s.sync(t)
	s.startService(t)
	in := inheritedFrom(t, systemd)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c.say("FDSTOREREMOVE=1\nFDNAME=a\n") // nobody is there
	c.store("c", "three")

	next := open(t, Options{Path: path, Manager: m, Inherited: in})
	c.store("d", "four")
	next.sync(t)
	fd, err := next.Main()
	if err != nil || fd < 0 {
		t.Fatal("the main process is not known any more", fd, err)
	}
	unix.Close(fd)
	want := "b two <nil>\nc three <nil>\nd four <nil>\n60000000 []\n"
	if got := next.startService(t); got != want {
		t.Errorf("the service was given\n%swant\n%s", got, want)
	}
	if got := systemd.Kept(t); !slices.Equal(got, []string{socketName, "b", "c", "d", mainName}) {
		t.Errorf("the service manager keeps %q", got)
	}
	next.Forget()
	if got := systemd.Kept(t); !slices.Equal(got, []string{socketName}) {
		t.Errorf("after all was forgotten the service manager keeps %q", got)
	}
}

// inheritedFrom is what a service manager would pass to the next process.
func inheritedFrom(t *testing.T, m *testenv.Manager) *Inherited {
	t.Helper()
	cmd := exec.Command("true")
	m.Give(t, cmd)
	in := &Inherited{}
	for _, f := range cmd.ExtraFiles {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		in.files = append(in.files, inherited{f.Name(), fd})
	}
	return in
}

// TestListener takes the socket that listens at a path, and no other one.
func TestListener(t *testing.T) {
	dir := t.TempDir()
	in := &Inherited{}
	for _, name := range []string{"other", "ours"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		in.files = append(in.files, inherited{name + ".socket", fd})
	}
	path := filepath.Join(dir, "ours")
	l, err := in.Listener(path)
	if err != nil || l == nil || l.Addr().String() != path {
		t.Fatal(l, err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket that the service manager has is gone: %v", err)
	}
	if again, err := in.Listener(path); again != nil || err != nil {
		t.Errorf("it was taken twice: %v, %v", again, err)
	}
	s := open(t, Options{Path: filepath.Join(dir, "notify"), Inherited: in})
	if n := s.Len(); n != 0 {
		t.Errorf("a socket that is none of ours is kept for the service: %d", n)
	}
	var none *Inherited
	if l, err := none.Listener(path); l != nil || err != nil {
		t.Error(l, err)
	}
	none.Close()
}
