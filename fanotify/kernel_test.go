package fanotify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A sparse is a file whose bytes come with Fill.
type sparse struct {
	f    *os.File
	data []byte
	fail atomic.Bool
	hold chan struct{} // Fill waits for it to be closed; nil: does not
	held atomic.Int64  // fills that have begun

	mu      sync.Mutex // guards present
	present map[int64]bool
}

const page = 4096

func (s *sparse) pages(off, n int64) (first, last int64) {
	size := int64(len(s.data))
	return min(off, size) / page, (min(off+n, size) + page - 1) / page
}

func (s *sparse) Ready(off, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first, last := s.pages(off, n)
	for p := first; p < last; p++ {
		if !s.present[p] {
			return false
		}
	}
	return true
}

func (s *sparse) Fill(ctx context.Context, off, n int64) error {
	s.held.Add(1)
	if s.hold != nil {
		select {
		case <-s.hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if s.fail.Load() {
		return errors.New("backend down")
	}
	first, last := s.pages(off, n)
	for p := first; p < last; p++ {
		at := p * page
		if _, err := s.f.WriteAt(s.data[at:min(at+page, int64(len(s.data)))], at); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := first; p < last; p++ {
		s.present[p] = true
	}
	return nil
}

func (s *sparse) sum(off, n int64) string { return sum(s.data[off : off+n]) }

// newSparse makes a file of n random bytes that are not there, on a file system
// that has pre-access events, and opens it before any mark.
func newSparse(t testing.TB, n int) *sparse {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	testenv.Kernel(t, "fanotify", Supported(dir))
	f, err := os.OpenFile(filepath.Join(dir, "blob"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(int64(n)); err != nil {
		t.Fatal(err)
	}
	s := &sparse{f: f, data: make([]byte, n), present: make(map[int64]bool)}
	rng := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = rng.Read(s.data)
	return s
}

func realGroup(t testing.TB, o Options) *Group {
	t.Helper()
	g, err := NewGroup(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func watch(t testing.TB, g *Group, s *sparse) {
	t.Helper()
	if err := g.Watch(s.f, s); err != nil {
		t.Fatal(err)
	}
}

// serve runs g.Serve until the test ends or stop is called, which returns
// Serve's error.
func serve(t testing.TB, g *Group) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Serve(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(deathPatience):
			return errors.New("Serve did not return")
		}
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return stop
}

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not in time: " + what)
		}
	}
}

func openFDs(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestKernelReadersGetTheRightBytes(t *testing.T) {
	s := newSparse(t, 1<<20+1234)
	size := int64(len(s.data))
	g := realGroup(t, Options{})
	watch(t, g, s)
	serve(t, g)
	r := startReader(t, nil)
	before := openFDs(t)
	r.want("ok", "open %s", s.f.Name())
	r.want(s.sum(5000, 100), "read 5000 100")
	r.want(s.sum(0, size), "read 0 %d", size)
	r.want(s.sum(size-500, 500), "read %d 4096", size-500)
	if st := g.Stats(); st.Filled == 0 || st.Denied+st.Own+st.Malformed+st.Lost+st.Refused != 0 {
		t.Errorf("cold: %+v", st)
	}
	r.want("ok", "drop")
	cold := g.Stats()
	r.want(s.sum(0, size), "read 0 %d", size)
	if st := g.Stats(); st.Ready == cold.Ready || st.Filled != cold.Filled {
		t.Errorf("the file is complete: want no more fills: before %+v, now %+v", cold, st)
	}
	if now := openFDs(t); now != before {
		t.Errorf("%d descriptors, %d before", now, before)
	}
}

func TestKernelMmap(t *testing.T) {
	s := newSparse(t, 300<<10)
	g := realGroup(t, Options{})
	watch(t, g, s)
	serve(t, g)
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	r.want(s.sum(8192, 200<<10), "mmap 8192 %d", 200<<10)
}

func TestKernelDenialIsEIOAndTheNextReadSucceeds(t *testing.T) {
	s := newSparse(t, 64<<10)
	s.fail.Store(true)
	var log bytes.Buffer
	g := realGroup(t, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	watch(t, g, s)
	stop := serve(t, g)
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	r.want("EIO", "read 0 4096")
	if st := g.Stats(); st.Denied == 0 || st.Allowed != 0 {
		t.Errorf("%+v", st)
	}
	s.fail.Store(false)
	r.want(s.sum(0, 4096), "read 0 4096")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "backend down") || !strings.Contains(log.String(), s.f.Name()) {
		t.Errorf("the log does not say what failed: %s", log.String())
	}
}

// Invariant 15: a file opened before the mark raises nothing for its holder,
// which is what the daemon's own descriptor lives on, and why the mount comes last.
func TestInvariant15MarkBeforeOpen(t *testing.T) {
	s := newSparse(t, 64<<10)
	g := realGroup(t, Options{})
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	watch(t, g, s)
	serve(t, g)
	r.want(sum(make([]byte, 4096)), "read 0 4096")
	own := make([]byte, 4096)
	if _, err := s.f.ReadAt(own, 0); err != nil {
		t.Fatal(err)
	}
	if st := g.Stats(); st.Events != 0 {
		t.Fatalf("files opened before the mark raised events: %+v", st)
	}
	r.want("ok", "open %s", s.f.Name())
	r.want(s.sum(0, 4096), "read 0 4096")
	if st := g.Stats(); st.Filled != 1 {
		t.Fatalf("%+v", st)
	}
}

// Invariant 16: what the kernel says that the group is.
func TestInvariant16GroupFlags(t *testing.T) {
	s := newSparse(t, 4096)
	g := realGroup(t, Options{})
	watch(t, g, s)
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", g.File().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	var flags, events, ino, dev, mask uint64
	for line := range strings.Lines(string(info)) {
		_, _ = fmt.Sscanf(line, "fanotify flags:%x event-flags:%x", &flags, &events)
		var mflags uint64
		_, _ = fmt.Sscanf(line, "fanotify ino:%x sdev:%x mflags:%x mask:%x", &ino, &dev, &mflags, &mask)
	}
	if flags&unix.FAN_UNLIMITED_QUEUE == 0 {
		t.Error("the queue is bounded: an event that does not fit is allowed")
	}
	const want = unix.FAN_CLASS_PRE_CONTENT | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK |
		unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS | unix.FAN_REPORT_FD_ERROR
	if flags != want {
		t.Errorf("flags %#x, want %#x\n%s", flags, want, info)
	}
	const accessMode = 3
	if events&accessMode != unix.O_RDONLY || events&unix.O_CLOEXEC == 0 {
		t.Errorf("event descriptors have flags %#x, want O_RDONLY|O_CLOEXEC", events)
	}
	w, err := fileOf(s.f, s)
	if err != nil || ino != w.id.ino || mask != unix.FAN_PRE_ACCESS {
		t.Errorf("mark on inode %d with mask %#x, want %d and %#x (%v)", ino, mask, w.id.ino, unix.FAN_PRE_ACCESS, err)
	}
}

// Invariant 18: numbers are used again all the time with 64 readers; an answer
// after the close, two in one write, or one refused for its errno would be lost.
func TestInvariant18ParallelReaders(t *testing.T) {
	s := newSparse(t, 600<<10)
	g := realGroup(t, Options{MaxInFlight: 16})
	watch(t, g, s)
	serve(t, g)
	r := startReader(t, nil)
	before := openFDs(t)
	r.want("ok", "open %s", s.f.Name())
	r.want(sum(s.data), "parallel 64 %d", len(s.data))
	if st := g.Stats(); st.Lost != 0 || st.Denied != 0 || st.Events != st.Allowed || st.Events < 64 {
		t.Errorf("%+v", st)
	}
	eventually(t, "event descriptors closed", func() bool { return openFDs(t) == before })
}

// Invariant 19: a complete file without its mark costs nothing; the mark can
// come back for those who opened the file under it.
func TestInvariant19UnwatchStopsEvents(t *testing.T) {
	s := newSparse(t, 256<<10)
	g := realGroup(t, Options{})
	watch(t, g, s)
	serve(t, g)
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	size := int64(len(s.data))
	r.want(sum(s.data), "read 0 %d", size)
	for range 2 { // the second finds no mark
		if err := g.Unwatch(s.f); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the fills end", func() bool { return g.Stats().InFlight == 0 })
	complete := g.Stats()
	r.want("ok", "drop")
	r.want(sum(s.data), "read 0 %d", size)
	if st := g.Stats(); st != complete {
		t.Errorf("events after Unwatch: %+v, before %+v", st, complete)
	}
	watch(t, g, s)
	r.want("ok", "drop")
	r.want(sum(s.data), "read 0 %d", size)
	if st := g.Stats(); st.Ready <= complete.Ready {
		t.Errorf("no events after the second Watch: %+v", st)
	}
}

// Invariant 20, the danger: this is what the package comment warns of. Should it
// fail one day, the kernel has learnt to fail closed.
func TestInvariant20LastCloseLetsReadersSeeZeros(t *testing.T) {
	s := newSparse(t, 64<<10)
	g := realGroup(t, Options{})
	watch(t, g, s)
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	reply := r.start("read 0 4096")
	time.Sleep(50 * time.Millisecond)
	for range 2 {
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := <-reply; got != sum(make([]byte, 4096)) {
		t.Errorf("reader got %q", got)
	}
}

// Invariant 20, the remedy: while anybody holds the group, its owner's death
// leaves readers waiting; the successor answers what was taken with EIO and
// serves what was not.
func TestInvariant20SuccessorServesTheGroup(t *testing.T) {
	s := newSparse(t, 64<<10)
	first := realGroup(t, Options{})
	watch(t, first, s)
	fd, err := unix.FcntlInt(first.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	taken, queued := startReader(t, nil), startReader(t, nil)
	taken.want("ok", "open %s", s.f.Name())
	queued.want("ok", "open %s", s.f.Name())

	takenReply := taken.start("read 0 4096")
	buf := make([]byte, largestEvent)
	n, err := first.f.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	e, _, err := parseEvent(buf[:n])
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(int(e.fd)) // as the death of the process does
	queuedReply := queued.start("read 8192 4096")
	time.Sleep(50 * time.Millisecond)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-takenReply:
		t.Fatalf("a reader was let go with %q although somebody holds the group", got)
	case got := <-queuedReply:
		t.Fatalf("a reader was let go with %q although somebody holds the group", got)
	case <-time.After(50 * time.Millisecond):
	}

	second, err := NewGroupFromFile(os.NewFile(uintptr(fd), "group"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { second.Close() })
	if err := second.DenyPending(); err != nil {
		t.Fatal(err)
	}
	if got := <-takenReply; got != "EIO" {
		t.Errorf("the reader whose event was taken got %q, want EIO", got)
	}
	watch(t, second, s)
	serve(t, second)
	if got := <-queuedReply; got != s.sum(8192, 4096) {
		t.Errorf("the reader whose event was queued got %q", got)
	}
	taken.want(s.sum(0, 4096), "read 0 4096")
	if st := second.Stats(); st.Denied != 1 {
		t.Errorf("%+v", st)
	}
}

func TestInvariant20UnknownFileIsDenied(t *testing.T) {
	s := newSparse(t, 64<<10)
	first := realGroup(t, Options{})
	watch(t, first, s)
	fd, err := unix.FcntlInt(first.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	second, err := NewGroupFromFile(os.NewFile(uintptr(fd), "group"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { second.Close() })
	serve(t, second) // has the mark, and does not know the file
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	r.want("EIO", "read 0 4096")
}

// Invariant 21: ranges past the end, and events without a length.
func TestInvariant21PastTheEndAndCountZero(t *testing.T) {
	s := newSparse(t, 10000)
	g := realGroup(t, Options{})
	watch(t, g, s)
	serve(t, g)
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	r.want(s.sum(9000, 1000), "read 9000 65536")
	r.want(sum(nil), "read 1000000 4096")
	denied := g.Stats().Denied
	r.want("EIO", "truncate 0")
	if st := g.Stats(); st.Denied != denied+1 {
		t.Errorf("%+v", st)
	}
	if info, err := s.f.Stat(); err != nil || info.Size() != 10000 {
		t.Errorf("somebody else could truncate the file: %v, %v", info, err)
	}
}

func TestKernelServeEndsWithContext(t *testing.T) {
	s := newSparse(t, 64<<10)
	s.hold = make(chan struct{})
	g := realGroup(t, Options{MaxInFlight: 1})
	watch(t, g, s)
	stop := serve(t, g)
	filling, queued := startReader(t, nil), startReader(t, nil)
	filling.want("ok", "open %s", s.f.Name())
	queued.want("ok", "open %s", s.f.Name())
	fillingReply := filling.start("read 0 4096")
	eventually(t, "fill begins", func() bool { return s.held.Load() > 0 })
	queuedReply := queued.start("read 8192 4096")
	time.Sleep(50 * time.Millisecond)
	if st := g.Stats(); st.Events != 1 || st.InFlight != 1 {
		t.Errorf("with one fill allowed: %+v", st)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if got := <-fillingReply; got != "EIO" {
		t.Errorf("the reader that was being served got %q", got)
	}
	if got := <-queuedReply; got != "EIO" {
		t.Errorf("the reader in the queue got %q", got)
	}
	close(s.hold)
	serve(t, g) // and it can be served again
	filling.want(s.sum(0, 4096), "read 0 4096")
}

func TestKernelKilledReader(t *testing.T) {
	s := newSparse(t, 64<<10)
	s.hold = make(chan struct{})
	g := realGroup(t, Options{})
	watch(t, g, s)
	serve(t, g)
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	reply := r.start("read 0 4096")
	eventually(t, "fill begins", func() bool { return s.held.Load() > 0 })
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if got := <-reply; got != "reader died" {
		t.Errorf("got %q", got)
	}
	close(s.hold)
	eventually(t, "the fill ends", func() bool { st := g.Stats(); return st.InFlight == 0 && st.Filled == 1 })
	next := startReader(t, nil)
	next.want("ok", "open %s", s.f.Name())
	next.want(s.sum(0, 4096), "read 0 4096")
}

// The safety net: a descriptor opened after the mark, in this process.
func TestKernelOwnReadIsLetThrough(t *testing.T) {
	s := newSparse(t, 64<<10)
	var log bytes.Buffer
	g := realGroup(t, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	watch(t, g, s)
	stop := serve(t, g)
	f, err := os.Open(s.f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 100)
	for i := range int64(3) {
		if _, err := f.ReadAt(p, i*8192); err != nil {
			t.Fatal(err)
		}
	}
	if st := g.Stats(); st.Own != 3 || st.Allowed != 3 || s.held.Load() != 0 {
		t.Errorf("%+v", st)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(log.String(), "let through"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, log.String())
	}
}

// With no descriptor left the kernel denies by itself; the loop goes on.
func TestKernelNoDescriptorsLeft(t *testing.T) {
	s := newSparse(t, 64<<10)
	g := realGroup(t, Options{})
	watch(t, g, s)
	serve(t, g)
	r := startReader(t, nil)
	r.want("ok", "open %s", s.f.Name())
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	got := r.ask("read 0 4096")
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if st := g.Stats(); got == "ok" || got == sum(make([]byte, 4096)) || st.Refused == 0 || st.Allowed != 0 {
		t.Errorf("the reader got %q: %+v", got, st)
	}
	r.want(s.sum(0, 4096), "read 0 4096")
}

func TestSupportedNamesTheMissingThing(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	testenv.Kernel(t, "fanotify", Supported(dir))
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("the probe left %v, %v", left, err)
	}

	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err == nil && st.Type == unix.TMPFS_MAGIC {
		err := Supported("/dev/shm")
		var e *kernel.UnsupportedError
		if !errors.As(err, &e) || !strings.Contains(err.Error(), "ext4, xfs or btrfs") || !strings.Contains(err.Error(), "/dev/shm") {
			t.Errorf("on tmpfs: %v", err)
		}
	}
	if err := Supported(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) || errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("without the directory: %v", err)
	}

	root := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	r := startReader(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: root, GidMappings: root})
	if got := r.ask("supported %s", dir); !strings.Contains(got, "CAP_SYS_ADMIN in the initial user namespace") {
		t.Errorf("in a user namespace: %s", got)
	}
}

func TestKernelWatchRefusals(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "fanotify", Supported(t.TempDir()))
	g := realGroup(t, Options{})
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := g.Watch(f, &sparse{}); !errors.Is(err, kernel.ErrNotSupported) || !strings.Contains(err.Error(), "/proc/self/status") {
		t.Errorf("a file of proc: %v", err)
	}
	if len(g.files) != 0 {
		t.Error("the refused file is still known")
	}
}

// What an event costs a read of 4 KiB that is ready: the difference of the two.
// The pages are cached, so that the disk is not in the figure.
func BenchmarkReadyRead(b *testing.B) {
	for _, c := range []struct{ marked, journal bool }{{false, false}, {true, false}, {true, true}} {
		b.Run(fmt.Sprintf("marked=%v/journal=%v", c.marked, c.journal), func(b *testing.B) {
			s := newSparse(b, 16<<20)
			if err := s.Fill(context.Background(), 0, int64(len(s.data))); err != nil {
				b.Fatal(err)
			}
			if err := s.f.Sync(); err != nil {
				b.Fatal(err)
			}
			var o Options
			if c.journal {
				o.Journal = newJournal(b)
			}
			g := realGroup(b, o)
			if c.marked {
				watch(b, g, s)
			}
			serve(b, g)
			r := startReader(b, nil)
			r.want("ok", "open %s", s.f.Name())
			b.ResetTimer()
			var ns float64
			if _, err := fmt.Sscan(r.ask("latency %d %d", b.N, len(s.data)), &ns); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(ns/1000, "µs-p50")
		})
	}
}
