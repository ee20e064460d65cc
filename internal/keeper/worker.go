package keeper

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// answerTime is how long a worker may leave its answers unread.
	answerTime = 30 * time.Second
	// drainTime is how long a dead worker's connection may last: a child of its may have it.
	drainTime = time.Second
	// lostTime is how long a worker may live on without its connection.
	lostTime = 5 * time.Second
)

// A worker is one process. Three goroutines belong to it (serve, write, wait), which ask
// the keeper's loop for everything; what is below the line is the loop's alone.
type worker struct {
	process *os.Process
	wait    func() (*os.ProcessState, error)
	conn    *net.UnixConn
	later   chan func() error // answers that did not come at once
	over    chan struct{}     // closed when serve has ended
	resume  chan struct{}     // lets serve go on after a pause
	own     sync.WaitGroup    // serve and write

	exe     *os.File // nil: the keeper's own
	started time.Time
	helloed bool   // has said hello
	helloID uint32 // what is to be answered when it may go on
	greeted bool   // has got the entries
	ready   bool
	readyAt time.Time
	ending  bool
	yields  bool
	told    bool // has got a signal to end
	paused  bool // serve waits for resume
	killAt  time.Time
	killWhy string
	killed  bool
	watch   watch
}

// command makes the command of a worker and its connection. The files are to be closed
// when it was started.
func (k *keeper) command(exe *os.File, standby bool) (*exec.Cmd, *net.UnixConn, []*os.File, error) {
	conn, theirs, err := socketPair()
	if err != nil {
		return nil, nil, nil, err
	}
	files := []*os.File{theirs}
	if i, found := k.table.items[journalName]; found && i.fd >= 0 && !standby {
		fd, err := unix.FcntlInt(uintptr(i.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, nil, nil, errors.Join(fmt.Errorf("duplicate the journal: %w", err), conn.Close(), theirs.Close())
		}
		files = append(files, os.NewFile(uintptr(fd), journalName))
	}
	cmd := k.o.Command(pathOf(exe))
	var numbers []string
	for range files {
		numbers = append(numbers, strconv.Itoa(3+len(cmd.ExtraFiles)+len(numbers)))
	}
	cmd.ExtraFiles = append(slices.Clone(cmd.ExtraFiles), files...)
	cmd.Env = slices.DeleteFunc(cmd.Environ(), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		return slices.Contains(managerEnv(), name) || slices.Contains([]string{envSocket, envState, envReturns, envAlive}, name)
	})
	cmd.Env = append(cmd.Env, envSocket+"="+strings.Join(numbers, ":"))
	if k.manager != nil {
		cmd.Env = append(cmd.Env, envReturns+"=1")
	}
	if every := k.o.HangTimeout / looksWithout; every > 0 {
		cmd.Env = append(cmd.Env, envAlive+"="+(every/signsPerLook).String())
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// A terminal signals its whole group: the worker would get everything twice.
	cmd.SysProcAttr.Setpgid = !cmd.SysProcAttr.Setsid
	return cmd, conn, files, nil
}

// pathOf is where exe can be executed, also by a child before its exec.
func pathOf(exe *os.File) string {
	if exe == nil {
		return ""
	}
	var path string
	_ = withFD(exe, func(fd int) error { // a file that is open has a descriptor
		path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
		return nil
	})
	return path
}

// start starts a worker.
func (k *keeper) start(exe *os.File, standby bool) (*worker, error) {
	cmd, conn, files, err := k.command(exe, standby)
	if err != nil {
		return nil, err
	}
	err = startUnblocked(cmd)
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the worker: %w", err), conn.Close())
	}
	setOOM(k.log, cmd.Process.Pid, workerOOM)
	w := newWorker(cmd.Process, conn, exe)
	w.watch.every = k.o.HangTimeout / looksWithout
	w.wait = func() (*os.ProcessState, error) {
		err := cmd.Wait()
		if errors.As(err, new(*exec.ExitError)) {
			err = nil
		}
		return cmd.ProcessState, err
	}
	k.watch(w)
	return w, nil
}

func newWorker(p *os.Process, conn *net.UnixConn, exe *os.File) *worker {
	return &worker{
		process: p, conn: conn, exe: exe, started: time.Now(),
		later: make(chan func() error, 2), over: make(chan struct{}), resume: make(chan struct{}, 1),
	}
}

// watch starts the goroutines of w; they end with its process.
func (k *keeper) watch(w *worker) {
	w.own.Go(func() {
		defer close(w.over)
		k.serve(w)
	})
	w.own.Go(func() { k.write(w) })
	k.goroutines.Go(func() {
		state, err := w.wait()
		end := time.AfterFunc(drainTime, func() { w.conn.Close() })
		w.own.Wait()
		end.Stop()
		w.conn.Close() // nobody listens there
		k.post(func() { k.exited(w, state, err) })
	})
}

// write gives the answers that did not come at once.
func (k *keeper) write(w *worker) {
	for {
		select {
		case answer := <-w.later:
			if err := answer(); err != nil {
				k.broken(w, err)
			}
		case <-w.over:
			return
		}
	}
}

// push has write answer. There is room: for a hello, which comes once, and for an Upgrade,
// of which busy allows no second one.
func (w *worker) push(answer func() error) {
	select {
	case w.later <- answer:
	case <-w.over:
	}
}

// busy reports whether w has not yet taken an answer.
func (w *worker) busy() bool { return len(w.later) > 0 }

// serve takes w's requests, one after the other.
func (k *keeper) serve(w *worker) {
	for r := newReceiver(w.conn); ; {
		m, err := r.next()
		var bad *badMessage
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !k.post(func() { w.paused = true }) {
				return
			}
			<-w.resume
			continue
		case err != nil && !errors.As(err, &bad):
			if !ended(err) {
				k.log.Warn("the worker's connection broke", "pid", w.process.Pid, "err", err)
			}
			k.post(func() { w.kill(time.Now().Add(lostTime), "its connection ended") })
			return
		}
		var late bool
		if bad != nil {
			m.id = bad.id
		} else if !k.post(func() { late, err = k.request(w, m) }) {
			closeAll(m.files())
			return
		}
		if !late {
			if err := w.answer(m.id, err); err != nil {
				k.broken(w, err)
			}
		}
	}
}

// broken ends a worker to which nothing can be said any more.
func (k *keeper) broken(w *worker, err error) {
	if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
		k.post(func() { w.kill(time.Now(), "it does not take answers: "+err.Error()) })
	}
}

// answer ends a request.
func (w *worker) answer(id uint32, err error) error {
	m := message{op: opDone, id: id, fd: -1}
	if err != nil {
		text := err.Error()
		m.op, m.data = opFailed, []byte(text[:min(len(text), MaxData)])
	}
	return w.send(m)
}

func (w *worker) send(m message) error {
	if err := w.conn.SetWriteDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	return send(w.conn, m)
}

// greet sends what t holds, for the hello that waits.
func (k *keeper) greet(w *worker) {
	items, id := k.table.list(), w.helloID
	w.push(func() error { // the table stays as it is until w may change it
		for _, i := range items {
			data, err := k.table.data(i)
			if err != nil {
				return errors.Join(err, w.answer(id, err))
			}
			if err := w.send(message{op: opEntry, id: id, name: i.name, data: data, fd: i.fd}); err != nil {
				return err
			}
		}
		if !k.post(func() { w.greeted = true }) {
			return nil
		}
		return w.answer(id, nil)
	})
}

// kill has w killed at a time, in place of any other time.
func (w *worker) kill(at time.Time, why string) {
	if !w.killed {
		w.killAt, w.killWhy = at, why
	}
}

// spare lets w live.
func (w *worker) spare() { w.kill(time.Time{}, "") }

func (m *message) files() []int {
	if m.fd < 0 {
		return nil
	}
	return []int{m.fd}
}

// The keeper is the last process to be killed when memory is short; a worker is like any
// other (proc_pid_oom_score_adj(5)).
const (
	keeperOOM = -999
	workerOOM = 0
)

// setOOM does what it is allowed to.
func setOOM(log *slog.Logger, pid, score int) {
	name := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	if err := os.WriteFile(name, []byte(strconv.Itoa(score)), 0o600); err != nil {
		log.Debug("oom score stays as it is", "err", err)
	}
}
