package sandbox

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Options say what the process keeps.
type Options struct {
	// Capabilities are those that it keeps, CAP_* numbers. A [User] keeps none.
	Capabilities []int
	// Writable are directories beneath which it may change everything, as far as files'
	// owners and modes let it; Removable those beneath which it may remove. They exist.
	Writable, Removable []string
	// UnixSockets lets it make unix sockets. Without them it reaches no other service of the
	// machine by one, also not those that trust whoever is root.
	UnixSockets bool
	User        *User // who it becomes; nil: it stays who it is
}

// A User is who a process becomes, without any further groups.
type User struct{ UID, GID int }

// A Report says what holds and, each with its reason, what does not.
type Report struct {
	Holds []string
	Lacks []string
}

func (r *Report) holds(what string) { r.Holds = append(r.Holds, what) }

func (r *Report) lacks(what string, err error) {
	r.Lacks = append(r.Lacks, what+": "+err.Error())
}

// Complete reports whether all parts hold.
func (r Report) Complete() bool { return len(r.Lacks) == 0 }

// String is the report as one line.
func (r Report) String() string {
	if r.Complete() {
		return strings.Join(r.Holds, ", ")
	}
	return strings.Join(append(r.Holds, "lacks "+strings.Join(r.Lacks, "; lacks ")), ", ")
}

// errCgo is why nothing can be done to the threads of a program.
var errCgo = errors.New("this program was built with cgo, whose threads cannot be changed; build it with CGO_ENABLED=0")

// Probe says what Enter could do here. It changes nothing.
func Probe() Report {
	var r Report
	if withCgo {
		r.lacks("sandbox", errCgo)
		return r
	}
	r.holds("no_new_privs")
	r.holds("capabilities")
	if abi, err := landlockABI(); err != nil {
		r.lacks("landlock", err)
	} else {
		r.holds(landlockName(abi))
	}
	if err := seccompSupported(); err != nil {
		r.lacks("seccomp", err)
	} else {
		r.holds("seccomp")
	}
	return r
}

// Enter changes the process to what o says. What the kernel does not have is in the report.
// After an error some parts hold and some do not, so the process should end. Call it once,
// while no other goroutine starts a process.
//
// Descriptors that are open stay as they are: a file that was opened for writing can be
// written to wherever it is.
func Enter(o Options) (Report, error) {
	r := Probe()
	if withCgo {
		return r, nil
	}
	if _, err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return r, fmt.Errorf("set no_new_privs: %w", err)
	}
	if abi, err := landlockABI(); err == nil {
		if err := restrictFiles(abi, o); err != nil {
			return r, fmt.Errorf("restrict file access with Landlock: %w", err)
		}
	}
	if err := dropPrivileges(o, &r); err != nil {
		return r, err
	}
	if seccompSupported() == nil { // the last: it refuses much of the above
		if err := filterCalls(o); err != nil {
			return r, fmt.Errorf("filter system calls with seccomp: %w", err)
		}
	}
	return r, nil
}

// allThreads does a system call in every thread. Where it fails in one and not in another
// the process ends. It stops the program for a moment, and for longer on a busy machine.
func allThreads(trap, a1, a2 uintptr) (uintptr, error) {
	r, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, 0, 0, 0, 0)
	if errno != 0 {
		return r, errno
	}
	return r, nil
}
