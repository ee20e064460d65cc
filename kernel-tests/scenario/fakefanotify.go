package scenario

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/fanotify/fanotifytest"
	"github.com/erofsd/erofsd/internal/daemon"
)

// A fakeFanotify is fanotifytest's kernel with file-backed EROFS on top. There is no
// guard: the fake kernel itself denies what a dead daemon had marked, as the guard
// would.
type fakeFanotify struct {
	deadline time.Duration

	mu   sync.RWMutex // guards what follows; held for reading while an event is queued
	k    *fanotifytest.Kernel
	dead bool
}

func newFakeFanotify(deadline time.Duration) *fakeFanotify { return &fakeFanotify{deadline: deadline} }

func (f *fakeFanotify) connect(t testing.TB) daemon.FakeKernel {
	t.Helper()
	k, group := fanotifytest.New(t)
	g, err := fanotify.NewFakeGroup(group, k.Mark, fanotify.Options{Deadline: f.deadline})
	if err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.k, f.dead = k, false
	return daemon.FakeKernel{Group: g}
}

func (f *fakeFanotify) mount(_ context.Context, s daemon.MountSpec) (*superblock, error) {
	f.mu.RLock()
	dead := f.dead
	f.mu.RUnlock()
	if dead {
		return nil, syscall.EIO // a mount goes on when its daemon dies; but nobody would list it here
	}
	boot, err := reopen(s.Bootstrap)
	if err != nil {
		return nil, err
	}
	var volumes []volume
	for _, d := range s.Devices {
		v, err := reopen(d)
		if err != nil {
			boot.Close()
			for _, v := range volumes {
				v.Close()
			}
			return nil, err
		}
		volumes = append(volumes, &markedFile{f, v, f.marked(v)})
	}
	st, err := boot.Stat()
	if err != nil {
		return nil, err
	}
	return newSuperblock(boot, st.Size(), volumes)
}

// reopen opens f's file anew, for reading.
func reopen(f *os.File) (*os.File, error) { return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())) }

func (f *fakeFanotify) marked(file *os.File) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.k.Marked(file)
}

func (f *fakeFanotify) sever() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dead = true
}

func (f *fakeFanotify) gone() {}

func (f *fakeFanotify) awaitMount(testing.TB) {}

// fail limits the size of files, which is the only way to make an ordinary write fail
// without privileges: the daemon sees EFBIG instead.
func (f *fakeFanotify) fail(err error) {
	const room = 4096
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_FSIZE, &l) != nil {
		return // the scenario sees that nothing failed
	}
	if l.Cur = l.Max; err != nil {
		signal.Ignore(unix.SIGXFSZ)
		l.Cur = room
	}
	_ = unix.Setrlimit(unix.RLIMIT_FSIZE, &l)
}

// A markedFile is a cache file that EROFS has open.
type markedFile struct {
	f      *fakeFanotify
	file   *os.File
	raises bool // it was marked when it was opened; else it never raises events
}

func (m *markedFile) Close() error { return m.file.Close() }

// ReadAt asks for windows of pages, as readahead does, and reads what is there then.
func (m *markedFile) ReadAt(p []byte, off int64) (int, error) {
	const window = 128 << 10
	end := (off + int64(len(p)) + page - 1) / page * page
	for at := off / page * page; at < end; at += window {
		if err := m.ask(at, min(window, end-at)); err != nil {
			return 0, err
		}
	}
	n, err := m.file.ReadAt(p, off)
	if err == io.EOF {
		clear(p[n:]) // the rest of the last page
		return len(p), nil
	}
	return n, err
}

// ask raises an event when the file has a mark, and waits for the answer.
func (m *markedFile) ask(off, n int64) error {
	r, err := m.raise(off, n)
	if r == nil || err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	switch a, err := r.Wait(ctx); {
	case err != nil:
		return err
	case a == fanotifytest.Allow:
		return nil
	case a == fanotifytest.DenyEIO:
		return syscall.EIO
	default:
		return fmt.Errorf("answer %#x", a)
	}
}

func (m *markedFile) raise(off, n int64) (*fanotifytest.Read, error) {
	m.f.mu.RLock()
	defer m.f.mu.RUnlock()
	switch {
	case !m.raises || !m.f.k.Marked(m.file):
		return nil, nil
	case m.f.dead:
		return nil, syscall.EIO
	}
	return m.f.k.Raise(m.file, off, n), nil
}
