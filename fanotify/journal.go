package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Layout of a journal: a page with the header, the read buffer, the slots. The
// slots are sparse: a page that no number has touched takes no memory.
const (
	journalMagic   = 0x6c6e726a2d6e6166 // "fan-jrnl" on a little-endian machine
	journalVersion = 1
	bufferAt       = 4096
	bufferLen      = batch * eventLen
	slotsAt        = bufferAt + bufferLen
	slotLen        = int(unsafe.Sizeof(slot{}))
	journalSlots   = 1 << 20
	journalLen     = slotsAt + journalSlots*slotLen
)

// What a slot knows. It is written last and cleared first.
const (
	slotEmpty   = 0
	slotFile    = 1 // an unanswered event of the file dev, ino
	slotUnknown = 2 // an unanswered event of an unknown file
)

const journalSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

type journalHeader struct {
	magic                                  uint64
	version, bufferLen, slotLen, slotCount uint32
	used                                   atomic.Uint32 // numbers below it have been numbers of events
}

type slot struct {
	state  atomic.Uint32
	_      uint32
	dev    uint64
	ino    uint64
	off, n int64
	_      [3]uint64 // to a cache line: neighbours are written by several goroutines
}

// A journal is the memory that says which events have been taken from the queue
// and not been answered. It is shared with whoever comes after the death of this
// process, at any instruction; so there is an order in all it is told:
//
//   - the kernel copies events straight into the buffer. An event is never known
//     to this process alone;
//   - an event in the buffer is struck out after it was answered, or after its slot
//     was written. Only then is the buffer wiped, before the next read;
//   - a slot is written before the work for its event begins, and cleared after the
//     answer was written; only then is the event's descriptor closed, and its number
//     free for another event.
//
// So an event may be in both places, or in one of them although it has been
// answered, but never in none while its reader waits.
//
// The reader of the queue alone uses the buffer; each slot is used by whoever has
// its event. A nil journal takes everything and does nothing.
type journal struct {
	f      *os.File // the caller's
	mem    []byte
	header *journalHeader

	mu   sync.Mutex // guards refs
	refs int        // the group, until its Close, and each Serve
}

// NewJournal makes an empty journal for [Options].Journal: a sealed memfd, which is
// the caller's. Its process hands it, with the group, to one that outlives it.
func NewJournal() (*os.File, error) {
	fd, err := unix.MemfdCreate("erofsd-journal", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err != nil {
		return nil, fmt.Errorf("make a journal of fanotify events: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "fanotify journal")
	if err := initJournal(f); err != nil {
		return nil, errors.Join(fmt.Errorf("make a journal of fanotify events: %w", err), f.Close())
	}
	return f, nil
}

func initJournal(f *os.File) error {
	if err := f.Truncate(int64(journalLen)); err != nil {
		return err
	}
	j, err := mapJournal(f)
	if err != nil {
		return err
	}
	defer j.release()
	h := j.header
	h.version, h.bufferLen, h.slotLen, h.slotCount = journalVersion, bufferLen, uint32(slotLen), journalSlots
	h.magic = journalMagic
	return control(f, func(fd int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, journalSeals)
		return err
	})
}

// openJournal maps the journal f. A file that is anything else is an error; one
// that somebody could truncate is, too, because using its memory would be the end of
// the process.
func openJournal(f *os.File) (*journal, error) {
	err := control(f, func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
		if err != nil || seals&unix.F_SEAL_SHRINK == 0 || st.Size != int64(journalLen) {
			return errors.New("it was not made by NewJournal of this version: hand over the file that it returned")
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open the journal %s of fanotify events: %w", f.Name(), err)
	}
	j, err := mapJournal(f)
	if err != nil {
		return nil, fmt.Errorf("map the journal %s of fanotify events: %w", f.Name(), err)
	}
	h := j.header
	version := h.version
	if h.magic != journalMagic || version != journalVersion || h.bufferLen != bufferLen || int(h.slotLen) != slotLen || h.slotCount != journalSlots {
		j.release()
		return nil, fmt.Errorf("open the journal %s of fanotify events: version %d, want %d: it is another program's; begin without it, and deny what is pending", f.Name(), version, journalVersion)
	}
	return j, nil
}

// mapJournal maps f. Header and buffer are locked, or at least there: when a page
// of the buffer is missing and the process is being killed, the kernel cannot copy
// an event, and denies it.
func mapJournal(f *os.File) (j *journal, err error) {
	j = &journal{f: f, refs: 1}
	err = control(f, func(fd int) error {
		j.mem, err = unix.Mmap(fd, 0, journalLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		return err
	})
	if err != nil {
		return nil, err
	}
	if unix.Mlock(j.mem[:slotsAt]) != nil { // for want of a right; they are used all the time, anyhow
		for at := 0; at < slotsAt; at += 4096 {
			_ = atomic.AddUint32((*uint32)(unsafe.Pointer(&j.mem[at])), 0) // is a write, and changes nothing
		}
	}
	j.header = (*journalHeader)(unsafe.Pointer(&j.mem[0]))
	return j, nil
}

// hold keeps the memory mapped until release. It reports false when it is not any
// more.
func (j *journal) hold() bool {
	if j == nil {
		return true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.refs == 0 {
		return false
	}
	j.refs++
	return true
}

// release ends a hold, or the one that mapJournal returned with.
func (j *journal) release() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.refs--; j.refs == 0 {
		_ = unix.Munmap(j.mem) // its only errors are wrong arguments
	}
}

// buffer is where read(2) puts events.
func (j *journal) buffer() []byte { return j.mem[bufferAt:slotsAt:slotsAt] }

// use notes fd as the number of an event.
func (j *journal) use(fd int32) {
	if j != nil && fd >= 0 && uint32(fd) >= j.header.used.Load() {
		j.header.used.Store(uint32(fd) + 1)
	}
}

// strike takes the first event of p, a part of the buffer, out of it.
func (j *journal) strike(p []byte) {
	if j != nil && len(p) >= metadataLen {
		noFD := int32(noFD)
		binary.NativeEndian.PutUint32(p[16:], uint32(noFD))
	}
}

// slot returns the slot of a number, or nil when the journal has none for it.
func (j *journal) slot(fd int32) *slot {
	if fd < 0 || fd >= journalSlots {
		return nil
	}
	return (*slot)(unsafe.Pointer(&j.mem[slotsAt+int(fd)*slotLen]))
}

// set writes the slot of fd. It reports false when there is none for this number.
func (j *journal) set(fd int32, state uint32, id inode, off, n int64) bool {
	if j == nil {
		return true
	}
	s := j.slot(fd)
	if s == nil {
		return false
	}
	s.dev, s.ino, s.off, s.n = id.dev, id.ino, off, n
	s.state.Store(state)
	return true
}

// clear empties the slot of fd.
func (j *journal) clear(fd int32) {
	if j == nil {
		return
	}
	if s := j.slot(fd); s != nil && s.state.Load() != slotEmpty {
		s.state.Store(slotEmpty)
	}
}

// reset empties the journal.
func (j *journal) reset() {
	for fd := range j.numbers() {
		j.clear(fd)
	}
	clear(j.buffer())
	j.header.used.Store(0)
}

// numbers returns the end of the numbers that were used.
func (j *journal) numbers() int32 { return int32(min(j.header.used.Load(), journalSlots)) }

// events are those in the buffer that have not been struck out, with what is wrong
// with them. It takes any content.
func (j *journal) events() iter.Seq2[event, error] {
	return func(yield func(event, error) bool) {
		for p := j.buffer(); len(p) > 0 && binary.NativeEndian.Uint32(p) != 0; {
			e, rest, err := parseEvent(p)
			if e.fd >= 0 && !yield(e, err) {
				return
			}
			p = rest
		}
	}
}

// A leftover is an unanswered event of another process, known by its number.
type leftover struct {
	fd     int32
	state  uint32 // slotFile, slotUnknown; or nonsense, like all that follows
	id     inode  // with slotFile
	off, n int64
}

// left returns what the slots have.
func (j *journal) left() (list []leftover) {
	for fd := range j.numbers() {
		s := j.slot(fd)
		if state := s.state.Load(); state != slotEmpty {
			list = append(list, leftover{fd: fd, state: state, id: inode{s.dev, s.ino}, off: s.off, n: s.n})
		}
	}
	return list
}
