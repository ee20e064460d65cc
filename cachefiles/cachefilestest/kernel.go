package cachefilestest

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
)

const (
	page = 4096
	// window is the most that one READ asks for: the usual readahead.
	window = 128 << 10
	// attachCalls is how many calls meet ENOBUFS after an object was accepted.
	attachCalls = 2
	// patience is how long a file may take to be closed at the end of the test.
	patience = 5 * time.Second
)

// A Kernel is the kernel's end. Its methods are safe for concurrent use.
type Kernel struct {
	t   testing.TB
	dir string

	mu         sync.Mutex // guards all that follows, and the requests, objects and files
	dev        *device    // the living daemon's; nil: none
	dead       bool
	requests   []*request // that wait for an answer, or to be read
	ended      map[uint32]bool
	sent       map[uint32]*Sent
	nextMsg    uint32
	nextObject uint32
	disk       map[cachefiles.Key]*content
	live       map[cachefiles.Key]*object
	contents   []*content
	files      []*file // that were not seen closed
	writeErr   error
	readErrs   []error
	noRestore  bool
	culling    bool
}

// A request is a message, or will be one.
type request struct {
	id     uint32
	op     uint32
	o      *object
	object uint32 // CLOSE: the number that o had
	off, n int64
	fresh  bool // not read yet, or read by a daemon that died and restored
	read   bool // by a daemon
	done   chan struct{}
	err    error // set before done is closed
	raw    []byte
	withFD bool
}

// A Sent is a message of the test's own.
type Sent struct {
	k       *Kernel
	answers int // guarded by Kernel.mu
}

// Answers returns how often it was answered.
func (s *Sent) Answers() int {
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	return s.answers
}

// A content is a file on the disk of the cache.
type content struct {
	f    *os.File
	size int64
}

// A file is what a daemon got with an OPEN: the writing end of a pipe, which
// tells when the last copy is closed.
type file struct {
	o    *object // nil: of a message of the test's own
	fd   int     // its number in the daemon
	pipe int     // our end
}

// New returns a kernel with an empty disk. At the end of the test every request
// that a living daemon has read must have been answered, and every file closed.
func New(t testing.TB) *Kernel {
	k := &Kernel{
		t: t, dir: t.TempDir(), ended: make(map[uint32]bool), sent: make(map[uint32]*Sent),
		disk: make(map[cachefiles.Key]*content), live: make(map[cachefiles.Key]*object),
	}
	for _, dir := range []string{"cache", "graveyard"} { // the real one makes them when it is bound
		if err := os.Mkdir(filepath.Join(k.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(k.end)
	return k
}

func (k *Kernel) end() {
	k.mu.Lock()
	if k.dev != nil && !k.dead {
		for _, r := range k.requests {
			if r.read && !r.fresh && r.raw == nil {
				k.t.Errorf("message %d, opcode %d, was never answered", r.id, r.op)
			}
		}
	}
	k.detach()
	k.mu.Unlock()
	for deadline := time.Now().Add(patience); k.openFiles() > 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if n := k.openFiles(); n > 0 {
		k.t.Errorf("%d files of objects are still open", n)
	}
	for _, f := range k.files {
		_ = unix.Close(f.pipe)
	}
	for _, c := range k.contents {
		c.f.Close()
	}
}

func (k *Kernel) openFiles() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.collect()
	return len(k.files)
}

// OpenFiles returns how many files of objects daemons have open now.
func (k *Kernel) OpenFiles() int { return k.openFiles() }

// collect forgets the files that have been closed. The caller holds k.mu.
func (k *Kernel) collect() {
	open := k.files[:0]
	for _, f := range k.files {
		if f.closed() {
			_ = unix.Close(f.pipe)
			f.detach()
			continue
		}
		open = append(open, f)
	}
	clear(k.files[len(open):])
	k.files = open
}

// closed reports whether the daemon has no copy any more.
func (f *file) closed() bool {
	p := []unix.PollFd{{Fd: int32(f.pipe)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1 && p[0].Revents&unix.POLLHUP != 0
}

// detach takes the file from its object.
func (f *file) detach() {
	if f.o != nil && f.o.file == f {
		f.o.file = nil
	}
}

// Device returns the device for a new daemon, bound. An older daemon is dead from
// then on, as after Kill. The device is closed at the end of the test.
func (k *Kernel) Device() *cachefiles.Device {
	k.t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		k.t.Fatal(err)
	}
	wake, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		k.t.Fatal(err)
	}
	k.mu.Lock()
	k.detach()
	calls := &device{k: k, wake: wake, files: make(map[int]*file)}
	k.dev = calls
	k.notify()
	k.mu.Unlock()
	d, err := cachefiles.NewFakeDevice(os.NewFile(uintptr(fd), "fake cachefiles device"), k.dir, calls)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { d.Close() })
	return d
}

// Kill is SIGKILL for the daemon, while somebody else holds the device: its
// system calls fail from then on, its files count as closed, and what it has read
// and not answered stays so until another one restores.
func (k *Kernel) Kill() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.detach()
}

// detach takes the device from its daemon. The caller holds k.mu.
func (k *Kernel) detach() {
	d := k.dev
	if d == nil {
		return
	}
	d.notify()
	d.gone = true
	_ = unix.Close(d.wake)
	k.dev = nil
	for _, f := range d.files {
		f.detach()
	}
}

// Die ends the cache, as when its last descriptor is closed or its disk fails:
// every request fails, and so does all that follows.
func (k *Kernel) Die() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dead = true
	for _, r := range k.requests {
		k.finish(r, unix.EIO)
	}
	k.requests = nil
	k.notify()
}

// FailWrites makes every write to a file fail with err, an errno; nil ends that.
func (k *Kernel) FailWrites(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.writeErr = err
}

// FailNextOpen makes the daemon's read of the next OPEN fail with err, an errno,
// and so the OPEN.
func (k *Kernel) FailNextOpen(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.readErrs = append(k.readErrs, err)
}

// NoRestore takes the command restore away, as before Linux 6.8.
func (k *Kernel) NoRestore() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noRestore = true
}

// WantCull sets whether poll says that something should be culled.
func (k *Kernel) WantCull(want bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.culling = want
	k.notify()
}

// Has reports whether the object of key is on disk. A new one is when it has been
// closed.
func (k *Kernel) Has(key cachefiles.Key) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.disk[key] != nil
}

// Pending returns how many requests wait to be read or answered.
func (k *Kernel) Pending() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.requests)
}

// Send has the daemon read a message of the test's own. With withFD a descriptor
// is put where an OPEN has it. Its answers are only counted, by the message's
// number, so take one that is not used otherwise.
func (k *Kernel) Send(p []byte, withFD bool) *Sent {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &Sent{k: k}
	if len(p) >= 4 {
		k.sent[binary.NativeEndian.Uint32(p)] = s
	}
	k.push(&request{raw: p, withFD: withFD})
	return s
}

// ask makes a request. The caller holds k.mu.
func (k *Kernel) ask(r *request) *request {
	r.id = k.nextMsg
	k.nextMsg++
	return k.push(r)
}

func (k *Kernel) push(r *request) *request {
	r.fresh, r.done = true, make(chan struct{})
	if k.dead {
		k.finish(r, unix.EIO)
		return r
	}
	k.requests = append(k.requests, r)
	k.notify()
	return r
}

// finish ends a request, which the caller takes off the list.
func (k *Kernel) finish(r *request, err error) {
	r.err = err
	if r.raw == nil {
		k.ended[r.id] = true
	}
	close(r.done)
}

// take takes a request off the list. The caller holds k.mu.
func (k *Kernel) take(r *request) {
	for i, q := range k.requests {
		if q == r {
			k.requests = append(k.requests[:i], k.requests[i+1:]...)
			return
		}
	}
}

// find returns the request with the given number. The caller holds k.mu.
func (k *Kernel) find(id uint32) *request {
	for _, r := range k.requests {
		if r.id == id && r.raw == nil {
			return r
		}
	}
	return nil
}

// notify makes the daemon's descriptor readable. The caller holds k.mu.
func (k *Kernel) notify() {
	if k.dev != nil {
		k.dev.notify()
	}
}

func (k *Kernel) newContent(size int64) *content {
	fd, err := unix.MemfdCreate("cachefiles content", unix.MFD_CLOEXEC)
	if err != nil {
		panic(fmt.Sprintf("cachefilestest: make a memfd: %v", err))
	}
	c := &content{f: os.NewFile(uintptr(fd), "content"), size: size}
	if err := unix.Ftruncate(fd, size); err != nil {
		k.t.Errorf("truncate: %v", err)
	}
	k.contents = append(k.contents, c)
	return c
}
