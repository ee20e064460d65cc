package fanotify

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	headroomPages = 256
	// headroomLeast is how many of them must be there for a read: a batch of events takes a
	// tenth of it, and others may take some at the same time.
	headroomLeast = headroomPages * 7 / 8
	// headroomAge is when they are made anew: this process may have been moved to another
	// memory cgroup, and what it had stays charged to the old one.
	headroomAge = time.Second
	pageLen     = 4096
)

// A headroom is memory that this process has and does not need: pages that the kernel may
// take whenever memory is short (MADV_FREE, Linux 4.5), and does take before it kills
// anybody.
//
// A read of the queue makes a file for every event, and charges it to the memory cgroup of
// the reader. Where that is full the kernel kills a process, and if that is this one, the
// read under way gets no memory, goes on all the same, and denies every event that it
// finds (try_charge_memcg of mm/memcontrol.c, fanotify_read and copy_event_to_user of
// fs/notify/fanotify/fanotify_user.c, 6.18): their readers have EIO, and nobody is asked.
// So nothing is read without a headroom. To restore it may be the end of this process, but
// then it has no event in its hands.
//
// One goroutine uses it.
type headroom struct {
	mem  []byte
	made time.Time
}

func newHeadroom() (*headroom, error) {
	mem, err := unix.Mmap(-1, 0, headroomPages*pageLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("set memory aside: %w", err)
	}
	return &headroom{mem: mem}, nil
}

func (h *headroom) release() { _ = unix.Munmap(h.mem) } // all of a mapping of ours: cannot fail

// restore returns when the headroom is there. It waits for memory as any first use of it
// does.
func (h *headroom) restore() {
	if now := time.Now(); now.Sub(h.made) > headroomAge {
		h.made = now
		_ = unix.Madvise(h.mem, unix.MADV_DONTNEED) // like the other: of ours, so cannot fail
	}
	for h.pages() < headroomLeast {
		for n := range headroomPages {
			h.mem[mark(n)] = 1
		}
		_ = unix.Madvise(h.mem, unix.MADV_FREE)
	}
}

// pages is how many are there: those that the kernel has taken read as zeros.
func (h *headroom) pages() (n int) {
	for i := range headroomPages {
		n += int(h.mem[mark(i)])
	}
	return n
}

// mark is where page n has a byte that is not zero. The distance is more than a page, so
// that the bytes do not share few places in the processor's cache.
func mark(n int) int { return n*pageLen + n%64*64 }
