package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// A reader that was told "it is there" reads the cache file after that, and nothing tells
// when it has (blobmgr's evict.go). It may be kept from running for long: by a machine that
// is overloaded, a low priority, a quota of processor time. So before a hole is punched
// every task that could be on its way is waited for, as RCU does for its readers: one that
// was runnable, or in an uninterruptible wait, when the data had been put in doubt, must
// since have been seen elsewhere. On its way a task is never in an interruptible wait; nor
// stopped, traced or idle, as these happen at the return to user space or between works.

// A task is a thread of any process. Numbers come again, with another start.
type task struct{ pid, tid int }

// A sample is of a task's state in procfs (proc_pid_stat(5)).
type sample struct {
	state        byte
	user, system uint64 // time on a processor in these modes, in 1/userHZ s
	start        string
	waits        string // in an uninterruptible wait: how often it has waited so far
}

// mayBeOnItsWay reports whether the task could be between an answer and its read.
func (s sample) mayBeOnItsWay() bool { return s.state == 'R' || s.state == 'D' }

const (
	// userHZ is the clock of stat's times, on every architecture but alpha.
	userHZ = 100
	// Who has run so long in user mode has left the way. It is more than one tick, because
	// the kernel estimates how a task's time is divided (cputime_adjust).
	userEnough = userHZ / 20
	// Who has run so long in the kernel alone has left it too: a task on its way may have
	// to reclaim memory, which takes long only when there is none.
	systemEnough = 10 * userHZ
	// stillRounds is for how many rounds one uninterruptible wait counts. On its way a task
	// waits longer only for the cache's disk, which shows in the page cache, or because it
	// is frozen, which counts by itself (freezer.go). Most that wait so do it for an answer.
	stillRounds = graceTicks
)

// A cohort is the tasks that may have been on their way at a tick, and have not been seen
// elsewhere since.
type cohort struct {
	at   uint32
	left map[task]onWay
}

// An onWay is a task of a cohort.
type onWay struct {
	first sample // when the cohort was made
	waits string // of the last sample
	still int    // rounds that it has been in that wait
}

const (
	maxCohorts = 4
	// cohortPause is between the making of two cohorts, in ticks: to make one is to look at
	// every task there is, some 20 µs each.
	cohortPause = graceTicks / 2
)

// A quiescence finds out which readers cannot be on their way any more. Who evicts has it
// look at every tick of the clock that eviction goes by.
type quiescence struct {
	proc    string // where procfs is mounted
	cohorts []cohort
	passed  uint32 // nobody is on its way who was allowed to before this tick
}

// look samples the cohorts, and with want makes another one. An error leaves it as it was
// as far as it counts.
func (q *quiescence) look(now uint32, want bool) error {
	for i := len(q.cohorts) - 1; i >= 0; i-- {
		c := q.cohorts[i]
		if err := q.again(c); err != nil {
			return err
		}
		if len(c.left) == 0 { // and so has everybody of those before
			q.passed, q.cohorts = c.at, q.cohorts[i+1:]
			break
		}
	}
	n := len(q.cohorts)
	if !want || n == maxCohorts || n > 0 && now-q.cohorts[n-1].at < cohortPause {
		return nil
	}
	if err := q.visible(); err != nil {
		return err
	}
	left, err := q.all()
	if err == nil {
		q.cohorts = append(q.cohorts, cohort{now, left})
	}
	return err
}

// again samples what is left of a cohort.
func (q *quiescence) again(c cohort) error {
	for t, o := range c.left {
		s, err := q.sample(t)
		if err != nil {
			return err
		}
		if s.waits == "" || s.waits != o.waits {
			o.waits, o.still = s.waits, 0
		} else {
			o.still++
		}
		c.left[t] = o
		if !s.mayBeOnItsWay() || s.start != o.first.start || s.user-o.first.user >= userEnough || s.system-o.first.system >= systemEnough || o.still >= stillRounds {
			delete(c.left, t)
		}
	}
	return nil
}

// initialPIDs is the first pid namespace (include/linux/proc_ns.h PROC_PID_INIT_INO).
const initialPIDs = "pid:[4026531836]"

// visible returns an error if there may be tasks that procfs does not show to this process.
func (q *quiescence) visible() error {
	ns, err := os.Readlink(filepath.Join(q.proc, "self/ns/pid"))
	if err == nil && ns != initialPIDs {
		err = errors.New("this process is in a pid namespace of its own: run it in the host's (hostPID: true)")
	}
	if err == nil {
		_, err = os.Stat(filepath.Join(q.proc, "1/stat"))
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%s is mounted with hidepid, or ProtectProc= is set: other processes are not seen: %w", q.proc, err)
	}
	if err != nil {
		return fmt.Errorf("images in use keep their data: look which tasks are reading: %w", err)
	}
	return nil
}

// all returns the tasks that may be on their way now. This process's are not: it does not
// read what has marks.
func (q *quiescence) all() (map[task]onWay, error) {
	buffer := make([]byte, listBuffer)
	pids, err := numbersIn(q.proc, buffer)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	left := map[task]onWay{}
	for _, pid := range pids {
		if pid == os.Getpid() {
			continue
		}
		tids, err := numbersIn(filepath.Join(q.proc, strconv.Itoa(pid), "task"), buffer)
		if err != nil {
			return nil, fmt.Errorf("list the threads of process %d: %w", pid, err)
		}
		for _, tid := range tids {
			t := task{pid, tid}
			s, err := q.sample(t)
			if err != nil {
				return nil, err
			}
			if s.mayBeOnItsWay() {
				left[t] = onWay{first: s, waits: s.waits}
			}
		}
	}
	return left, nil
}

// listBuffer is for the threads of a process in one go: between two calls one could be
// passed over when others end. It has room for some 40 000.
const listBuffer = 1 << 20

// numbersIn returns the names in a directory of procfs that are numbers; none if it is gone.
func numbersIn(dir string, buffer []byte) (list []int, err error) {
	f, err := os.Open(dir)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for {
		n, err := syscall.ReadDirent(int(f.Fd()), buffer)
		if n <= 0 || err != nil {
			if gone(err) {
				err = nil
			}
			return list, err
		}
		_, _, names := syscall.ParseDirent(buffer[:n], -1, nil)
		for _, name := range names {
			if i, err := strconv.Atoi(name); err == nil {
				list = append(list, i)
			}
		}
	}
}

// sample looks at a task; the zero sample if it has ended.
func (q *quiescence) sample(t task) (s sample, err error) {
	dir := filepath.Join(q.proc, strconv.Itoa(t.pid), "task", strconv.Itoa(t.tid))
	p, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err == nil {
		s, err = parseStat(p)
	}
	if err == nil && s.state == 'D' {
		p, err = os.ReadFile(filepath.Join(dir, "status"))
		s.waits = waitsIn(p)
	}
	if gone(err) {
		return sample{}, nil
	}
	if err != nil {
		return sample{}, fmt.Errorf("look what thread %d does: %w", t.tid, err)
	}
	return s, nil
}

// waitsIn returns the number of times that a task has waited, from its status.
func waitsIn(p []byte) string {
	_, rest, _ := bytes.Cut(p, []byte("\nvoluntary_ctxt_switches:"))
	n, _, _ := bytes.Cut(rest, []byte("\n"))
	return string(bytes.TrimSpace(n))
}

// parseStat reads what a sample has. The name before it may have any byte, parentheses too.
func parseStat(p []byte) (s sample, err error) {
	fields := bytes.Fields(p[bytes.LastIndexByte(p, ')')+1:])
	if len(fields) < 20 || len(fields[0]) != 1 {
		return sample{}, errors.New("its stat is not as proc(5) has it")
	}
	s.state, s.start = fields[0][0], string(fields[19])
	var errs [2]error
	s.user, errs[0] = strconv.ParseUint(string(fields[11]), 10, 64)
	s.system, errs[1] = strconv.ParseUint(string(fields[12]), 10, 64)
	return s, errors.Join(errs[:]...)
}

// gone reports whether the error is that of a task which has ended.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}
