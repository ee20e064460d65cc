// Package fanotifytest is the kernel's end of a fanotify group, for tests of
// its other end without privileges or a particular kernel.
//
// A [Kernel] talks over a SOCK_SEQPACKET socketpair: a real descriptor under the
// real poller, one message for each read(2). Event descriptors are real as well.
// It encodes events by itself, from fanotify(7), and so checks the codec too; and
// it fails the test when an event is answered twice, never, or after its
// descriptor was closed. It never blocks a reader, and it never reuses what
// package fanotify has.
//
// Read first: [Kernel], [Read]. Locks: Kernel.mu, held over system calls that do
// not wait.
package fanotifytest

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Pid is the process that all events come from. It is none of ours.
const Pid = 0x7ffffff0

// patience is how long an answer may take.
const patience = 20 * time.Second

// An Answer is the response word of an event.
type Answer uint32

// Allow is FAN_ALLOW, DenyEIO is FAN_DENY with EIO.
const (
	Allow   Answer = 1
	DenyEIO Answer = 2 | Answer(unix.EIO)<<24
)

// A Read is an event that waits for its answer.
type Read struct {
	FD     int32 // of the event; the group's owner closes it
	answer chan Answer
}

// Answer waits for the answer and returns it.
func (r *Read) Answer(t testing.TB) Answer {
	t.Helper()
	select {
	case a := <-r.answer:
		return a
	case <-time.After(patience):
		t.Fatalf("no answer to event %d in %v", r.FD, patience)
		return 0
	}
}

// Wait waits for the answer until ctx is done. It is for readers that are not the
// test's own goroutine.
func (r *Read) Wait(ctx context.Context) (Answer, error) {
	select {
	case a := <-r.answer:
		return a, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("no answer to event %d: %w", r.FD, ctx.Err())
	}
}

// Answered returns the answer if it has come.
func (r *Read) Answered() (Answer, bool) {
	select {
	case a := <-r.answer:
		return a, true
	default:
		return 0, false
	}
}

// A Kernel is the kernel's end of one group. Its methods are safe for
// concurrent use.
type Kernel struct {
	t    testing.TB
	f    *os.File
	conn syscall.RawConn
	done chan struct{}

	mu      sync.Mutex // guards what follows, and the order of opening descriptors and taking answers
	waiting map[int32]*Read
	marks   map[[2]uint64]bool
	markErr error
}

// New returns a kernel and the descriptor of a group, which the caller owns. At
// the end of the test every event must have been answered.
func New(t testing.TB) (k *Kernel, group *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	k = &Kernel{
		t: t, f: os.NewFile(uintptr(fds[0]), "kernel"), done: make(chan struct{}),
		waiting: make(map[int32]*Read), marks: make(map[[2]uint64]bool),
	}
	if k.conn, err = k.f.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(k.done)
		_ = k.conn.Read(func(uintptr) bool { // ends when f is closed
			k.mu.Lock()
			defer k.mu.Unlock()
			return k.collect()
		})
	}()
	t.Cleanup(k.close)
	return k, os.NewFile(uintptr(fds[1]), "fake fanotify group")
}

func (k *Kernel) close() {
	k.mu.Lock()
	k.collect()
	for fd := range k.waiting {
		k.t.Errorf("event %d was never answered", fd)
	}
	k.mu.Unlock()
	k.f.Close()
	<-k.done
}

// collect takes all answers that are there. It reports whether there can be no
// more. The caller holds k.mu.
func (k *Kernel) collect() (end bool) {
	p := make([]byte, 64)
	for {
		var n int
		var err error
		cerr := k.conn.Control(func(fd uintptr) { n, err = unix.Read(int(fd), p) })
		switch {
		case err == unix.EAGAIN:
			return false
		case err == unix.EINTR:
			continue
		case cerr != nil || err != nil || n == 0:
			return true
		case n != 8:
			k.t.Errorf("an answer of %d bytes, want one answer of 8 in each write", n)
			continue
		}
		fd := int32(binary.NativeEndian.Uint32(p))
		a := Answer(binary.NativeEndian.Uint32(p[4:]))
		r := k.waiting[fd]
		if r == nil {
			k.t.Errorf("answer %#x to event %d, for which nobody waits", a, fd)
			continue
		}
		delete(k.waiting, fd)
		r.answer <- a
	}
}

// Open makes the descriptor of an event on f's file, to be sent with
// [Kernel.Send] in a message of the test's own making.
func (k *Kernel) Open(f *os.File) *Read {
	k.mu.Lock()
	defer k.mu.Unlock()
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		k.t.Errorf("open an event's file: %v", err)
		fd = -int(unix.EMFILE)
	}
	k.collect()
	r := &Read{FD: int32(fd), answer: make(chan Answer, 1)}
	if k.waiting[r.FD] != nil {
		k.t.Errorf("descriptor %d was closed, or given away, before its event was answered", fd)
	}
	k.waiting[r.FD] = r
	return r
}

// Respond is write(2) of an answer, for groups that can be given another one than
// that of their descriptor. Unlike there, an answer that nobody waits for is no
// failure of the test but ENOENT, as it is after the death of a group's owner.
func (k *Kernel) Respond(fd int32, answer uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.collect()
	r := k.waiting[fd]
	if r == nil {
		return unix.ENOENT
	}
	delete(k.waiting, fd)
	r.answer <- Answer(answer)
	return nil
}

// Orphan closes the event's descriptor, as the death of its process does. The event
// still waits for an answer by its number, and another event must not get that.
func (k *Kernel) Orphan(r *Read) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := unix.Close(int(r.FD)); err != nil {
		k.t.Errorf("close the descriptor of event %d: %v", r.FD, err)
	}
}

// Send puts a message into the queue. The other end must read all of it at once,
// or the rest is lost.
func (k *Kernel) Send(p []byte) {
	if _, err := k.f.Write(p); err != nil {
		k.t.Errorf("send an event: %v", err)
	}
}

// Raise queues the event of a read of n bytes at off of f's file.
func (k *Kernel) Raise(f *os.File, off, n int64) *Read {
	r := k.Open(f)
	k.Send(Event(r.FD, Pid, uint64(off), uint64(n)))
	return r
}

// Event encodes a pre-access event with one range record.
func Event(fd, pid int32, off, n uint64) []byte {
	p := Metadata(48, 3, 24, 0x100000, fd, pid)
	p = append(p, 6, 0)
	p = binary.NativeEndian.AppendUint16(p, 24)
	p = binary.NativeEndian.AppendUint32(p, 0)
	p = binary.NativeEndian.AppendUint64(p, off)
	return binary.NativeEndian.AppendUint64(p, n)
}

// Metadata encodes the fixed part of an event (struct fanotify_event_metadata).
func Metadata(length uint32, version uint8, metadataLen uint16, mask uint64, fd, pid int32) []byte {
	p := binary.NativeEndian.AppendUint32(nil, length)
	p = append(p, version, 0)
	p = binary.NativeEndian.AppendUint16(p, metadataLen)
	p = binary.NativeEndian.AppendUint64(p, mask)
	p = binary.NativeEndian.AppendUint32(p, uint32(fd))
	return binary.NativeEndian.AppendUint32(p, uint32(pid))
}

// Mark is fanotify_mark(2) for an inode mark of f's file.
func (k *Kernel) Mark(f *os.File, flags uint) error {
	id, err := inode(f)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.markErr != nil:
		return k.markErr
	case flags == unix.FAN_MARK_ADD:
		k.marks[id] = true
	case flags == unix.FAN_MARK_REMOVE && !k.marks[id]:
		return unix.ENOENT
	case flags == unix.FAN_MARK_REMOVE:
		delete(k.marks, id)
	default:
		return unix.EINVAL
	}
	return nil
}

// Marked reports whether f's file has a mark.
func (k *Kernel) Marked(f *os.File) bool {
	id, err := inode(f)
	if err != nil {
		k.t.Errorf("look at a file: %v", err)
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.marks[id]
}

// inode returns the device and the number of f's file.
func inode(f *os.File) (id [2]uint64, err error) {
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	return [2]uint64{st.Dev, st.Ino}, err
}

// FailMark makes every further Mark fail with err; nil ends that.
func (k *Kernel) FailMark(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.markErr = err
}

// Marks returns the number of marked files.
func (k *Kernel) Marks() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.marks)
}
