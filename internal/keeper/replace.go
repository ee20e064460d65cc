package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// envState tells a keeper that it was another one before its exec, and where the state is.
const envState = "EROFSD_KEEPER_STATE"

// pauseTime is how long a worker may take to read its answers when the keeper is about to
// become another.
const pauseTime = 5 * time.Second

// A state is what a keeper tells itself through exec. Numbers are of descriptors.
type state struct {
	Worker, Conn, Exe int
	Log               int
	LogID             uint64
	Files             map[uint64]int
	Failures          int
	Look              time.Duration  // between two looks at the worker; 0: it is not watched
	End               syscall.Signal // 0: nobody wishes it
	Told              bool
}

// becomeNew executes the worker's executable in this process. It returns when that did not
// succeed, and the keeper goes on as it is.
func (k *keeper) becomeNew() {
	w := k.current
	if !k.pingAt.IsZero() {
		k.live() // the next keeper takes for stored what this one has stored
	}
	err := k.pause(w)
	if err == nil {
		err = k.exec(w)
	}
	k.log.Warn("keeper goes on with its old executable", "err", err)
	if err := w.conn.SetReadDeadline(time.Time{}); err != nil {
		k.log.Debug("worker's connection has ended", "err", err)
	}
	select {
	case w.resume <- struct{}{}:
	default:
	}
}

// pause has w's serve wait, with every request answered and none half read.
func (k *keeper) pause(w *worker) error {
	w.paused = false
	if err := w.conn.SetReadDeadline(past()); err != nil {
		return err
	}
	timeout := time.NewTimer(pauseTime)
	defer timeout.Stop()
	for !w.paused {
		select {
		case c := <-k.calls:
			c.f()
			close(c.done)
		case s := <-k.signals:
			k.signal(s)
		case <-timeout.C:
			return errors.New("the worker does not take its answers")
		}
		if k.current != w || k.ended || k.next != nil || w.ending {
			return errors.New("the worker has gone on to something else")
		}
	}
	for len(k.signals) > 0 {
		k.signal(<-k.signals)
	}
	return nil
}

// exec becomes the executable of w. It returns only with an error.
func (k *keeper) exec(w *worker) error {
	s := state{Worker: w.process.Pid, LogID: k.table.logID, Files: make(map[uint64]int), Failures: k.failures, Told: w.told}
	s.End, _ = k.end.(syscall.Signal)
	if !w.watch.at.IsZero() {
		s.Look = w.watch.every
	}
	keep := []int{}
	for _, i := range k.table.items {
		if i.fd >= 0 {
			s.Files[i.id] = i.fd
			keep = append(keep, i.fd)
		}
	}
	raw, err := w.conn.SyscallConn()
	if err != nil {
		return err
	}
	note := func(to *int) func(int) error { return func(fd int) error { *to = fd; return nil } }
	err = errors.Join(raw.Control(func(fd uintptr) { s.Conn = int(fd) }), withFD(k.table.log, note(&s.Log)), withFD(w.exe, note(&s.Exe)))
	if err != nil {
		return err
	}
	file, err := writeState(s)
	if err != nil {
		return err
	}
	defer file.Close()
	var fd int
	if err := withFD(file, note(&fd)); err != nil {
		return err
	}
	keep = append(keep, s.Conn, s.Log, s.Exe, fd)
	if err := setInherited(keep, true); err != nil {
		return errors.Join(err, setInherited(keep, false))
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "LISTEN_") })
	k.log.Info("keeper becomes the new executable")
	err = execBlocked(fmt.Sprintf("/proc/self/fd/%d", s.Exe), append(env, envState+"="+strconv.Itoa(fd)))
	return errors.Join(err, setInherited(keep, false))
}

func writeState(s state) (*os.File, error) {
	file, err := memoryFile("keeper's state")
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(file).Encode(s); err != nil {
		return nil, errors.Join(fmt.Errorf("write the keeper's state: %w", err), file.Close())
	}
	return file, nil
}

// setInherited makes descriptors survive an exec, or not.
func setInherited(fds []int, yes bool) error {
	flag := unix.FD_CLOEXEC
	if yes {
		flag = 0
	}
	for _, fd := range fds {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, flag); err != nil {
			return fmt.Errorf("set the flags of descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// execBlocked executes path with our arguments. Signals wait until the new program has
// called Notify: before that they would kill it.
func execBlocked(path string, env []string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	set := signalSet()
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	err := syscall.Exec(path, os.Args, env)
	return errors.Join(fmt.Errorf("execute %s: %w", path, err), unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, nil))
}

// startUnblocked starts cmd with signals that are not blocked, as execBlocked left them.
func startUnblocked(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	set := signalSet()
	if err := unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, nil); err != nil {
		return fmt.Errorf("unblock signals: %w", err)
	}
	return cmd.Start()
}

func signalSet() unix.Sigset_t {
	var set unix.Sigset_t
	bits := uint(1024 / len(set.Val)) // of a word: the type has 1024 bits
	for _, s := range passed() {
		n := uint(s.(syscall.Signal)) - 1
		set.Val[n/bits] |= 1 << (n % bits)
	}
	return set
}

// passed are the signals that are passed on.
func passed() []os.Signal {
	return []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2}
}

// resume goes on where the keeper was before its exec; false: there was none.
func (k *keeper) resume() (bool, error) {
	value, found := os.LookupEnv(envState)
	if !found {
		return false, nil
	}
	if err := os.Unsetenv(envState); err != nil {
		return false, err
	}
	s, err := readState(value)
	if err != nil {
		return false, fmt.Errorf("resume the keeper: %w; its worker lives on, restart the service", err)
	}
	conn, err := connOf(os.NewFile(uintptr(s.Conn), "worker's socket"))
	if err != nil {
		return false, err
	}
	log := os.NewFile(uintptr(s.Log), "keeper's table")
	t, lost, err := loadTable(k.manager, log, s.LogID, s.Files)
	if err == nil && len(lost)+len(s.Files) > 0 {
		err = fmt.Errorf("%d entries without a descriptor, %d descriptors without an entry", len(lost), len(s.Files))
	}
	if err != nil {
		return false, errors.Join(fmt.Errorf("resume the keeper: %w", err), conn.Close(), log.Close())
	}
	process, err := os.FindProcess(s.Worker)
	if err != nil {
		return false, errors.Join(fmt.Errorf("resume the keeper: %w", err), conn.Close(), t.close(false))
	}
	w := newWorker(process, conn, nil)
	w.wait = process.Wait
	if w.watch.every = s.Look; s.Look > 0 {
		k.alive(w)
	}
	w.helloed, w.greeted, w.ready, w.readyAt, w.told = true, true, true, time.Now(), s.Told
	k.table, k.current, k.served, k.failures, k.unready = t, w, true, s.Failures, time.Time{}
	if s.End != 0 {
		k.end = s.End
	}
	k.noteKept()
	k.startPings()
	k.watch(w)
	k.log.Info("keeper is the new executable", "worker", s.Worker, "entries", len(t.items))
	return true, nil
}

// noteKept counts what the service manager keeps since before the exec.
func (k *keeper) noteKept() {
	k.manager.note(workerName)
	k.manager.note(logName(k.table.logID))
	for _, i := range k.table.items {
		if i.fd >= 0 {
			k.manager.note(fdName(i.id))
		}
	}
}

// readState reads what exec wrote and takes care of all descriptors in it.
func readState(value string) (state, error) {
	fd, err := strconv.Atoi(value)
	if err != nil || fd < 0 {
		return state{}, fmt.Errorf("%s is %q, which no keeper writes; unset it", envState, value)
	}
	file := os.NewFile(uintptr(fd), "keeper's state")
	defer file.Close()
	if _, err := file.Seek(0, 0); err != nil {
		return state{}, err
	}
	var s state
	if err := json.NewDecoder(file).Decode(&s); err != nil {
		return state{}, err
	}
	unix.CloseOnExec(s.Conn)
	unix.CloseOnExec(s.Log)
	for _, fd := range s.Files {
		unix.CloseOnExec(fd)
	}
	closeAll([]int{s.Exe}) // this very program
	return s, nil
}
