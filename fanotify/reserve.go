package fanotify

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A Reservation occupies the descriptor numbers of events that a dead process left
// unanswered, so that the kernel cannot give them to new events of this one: answers
// are matched by number alone. It is safe for concurrent use.
type Reservation struct {
	mu   sync.Mutex         // guards held
	held map[int32]struct{} // numbers that are descriptors of ours, of the journal's file
}

// Reserve reserves every number that journal says is unanswered. Call it before this
// process opens anything else: a number that is in use already cannot be reserved,
// and the group is not read before its event has been filled and answered. The result
// is for [Options].Reservation; until then, Close gives the numbers back.
//
// An error means that journal is none, or of another version.
func Reserve(journal *os.File) (*Reservation, error) {
	j, err := openJournal(journal)
	if err != nil {
		return nil, fmt.Errorf("reserve descriptor numbers: %w", err)
	}
	defer j.release()
	r := &Reservation{}
	if err := r.reserve(j); err != nil {
		return nil, errors.Join(fmt.Errorf("reserve descriptor numbers: %w", err), r.Close())
	}
	return r, nil
}

// reserve adds what can be reserved of the numbers that j says are unanswered.
func (r *Reservation) reserve(j *journal) error {
	return control(j.f, func(from int) error {
		for e := range j.events() {
			r.occupy(from, e.fd)
		}
		for _, l := range j.left() {
			r.occupy(from, l.fd)
		}
		return nil
	})
}

// occupy makes fd a copy of from, if it is free. Unlike dup3 it never replaces what
// another goroutine has just opened.
func (r *Reservation) occupy(from int, fd int32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.held[fd]; ok {
		return
	}
	got, err := unix.FcntlInt(uintptr(from), unix.F_DUPFD_CLOEXEC, int(fd))
	switch {
	case err != nil: // beyond the limit of open files, where events get no number either, or at it
	case int32(got) != fd:
		_ = unix.Close(got)
	default:
		if r.held == nil {
			r.held = make(map[int32]struct{})
		}
		r.held[fd] = struct{}{}
	}
}

func (r *Reservation) holds(fd int32) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.held[fd]
	return ok
}

// give frees fd, if it is reserved: its event has been answered.
func (r *Reservation) give(fd int32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.held[fd]; ok {
		delete(r.held, fd)
		_ = unix.Close(int(fd)) // a copy: nothing to lose
	}
}

// keep frees all numbers but those of list.
func (r *Reservation) keep(list []leftover) {
	wanted := make(map[int32]bool, len(list))
	for _, l := range list {
		wanted[l.fd] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for fd := range r.held {
		if !wanted[fd] {
			delete(r.held, fd)
			_ = unix.Close(int(fd))
		}
	}
}

// Close frees all numbers that are still reserved. Once a group has the reservation
// its Close does this. A second call, or a nil Reservation, does nothing.
func (r *Reservation) Close() error {
	if r != nil {
		r.keep(nil)
	}
	return nil
}
