package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Options say how a keeper runs its worker. Zero times take their defaults.
type Options struct {
	// Command makes the worker's command from an executable, "" for the keeper's own
	// (/proc/self/exe). Its Stdin, Stdout and Stderr are files or nil. Required.
	Command func(exe string) *exec.Cmd
	Logger  *slog.Logger // nil: nothing is logged

	// Backoff is the pause between a worker's death and the next start.
	Backoff Backoff
	// ReadyTimeout is how long a worker may take from its start to Ready, or a successor
	// from its predecessor's end; then it is killed and started anew. Default 30 s.
	ReadyTimeout time.Duration
	// HelloTimeout is how long a successor may take to call Entries. Default 10 s.
	HelloTimeout time.Duration
	// YieldTimeout is how long a worker may take to end once its successor is ready to
	// take over; then it is killed. Default 30 s.
	YieldTimeout time.Duration
	// HangTimeout is how long a worker that serves may give no sign of life (Client.Alive);
	// then it is killed and started anew. 0: for ever.
	HangTimeout time.Duration

	// StateVersion is what a successor must say (Client.StateVersion).
	StateVersion string
}

// A Backoff begins with no pause, goes on with Min (default 100 ms), doubles up to Max
// (5 s), and begins anew when a worker was ready for Stable (30 s).
type Backoff struct{ Min, Max, Stable time.Duration }

func (o *Options) setDefaults() {
	set := func(d *time.Duration, to time.Duration) {
		if *d <= 0 {
			*d = to
		}
	}
	set(&o.Backoff.Min, 100*time.Millisecond)
	set(&o.Backoff.Max, 5*time.Second)
	set(&o.Backoff.Stable, 30*time.Second)
	set(&o.ReadyTimeout, 30*time.Second)
	set(&o.HelloTimeout, 10*time.Second)
	set(&o.YieldTimeout, 30*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// pause is the pause after so many failures in a row.
func (b Backoff) pause(failures int) time.Duration {
	if failures == 0 {
		return 0
	}
	d := b.Min
	for ; failures > 1 && d < b.Max; failures-- {
		d *= 2
	}
	return min(d, b.Max)
}

// A keeper is Run's state, which belongs to its loop alone. Everything else asks the loop
// with post.
type keeper struct {
	o       Options
	log     *slog.Logger
	manager *manager
	table   *table

	calls      chan task
	over       chan struct{} // closed at the loop's end
	signals    chan os.Signal
	goroutines sync.WaitGroup

	current *worker  // who has the entries, nil between two
	next    *worker  // a successor that stands by
	asker   *worker  // whose Upgrade waits for an answer
	askID   uint32   // its request
	agreed  bool     // current must yield to next
	exe     *os.File // of the workers, nil: the keeper's own

	served    bool // a worker was ready once
	failures  int
	restartAt time.Time
	pingAt    time.Time
	unready   time.Time // since when there is no worker that serves
	end       os.Signal // that asks for the end
	pending   []os.Signal
	replace   bool // by the executable of current

	ended   bool
	code    int
	release bool // what is held, at the end
}

// Run is the keeper until its worker has ended in order (Client.End), or has ended before
// any was ready; it returns that worker's exit code, 128 and the number of the signal that
// killed it. A worker that ends in any other way is started anew and gets the entries.
//
// SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are passed on to the worker. The end of ctx
// is a SIGTERM. A wish to end outlives a worker that dies of something else.
//
// Call it once in a process, before anything starts another one, from a main that would
// run the same again: after an Upgrade, the new executable is executed in this process
// with the same arguments, and its Run goes on where this one was.
func Run(ctx context.Context, o Options) (code int, err error) {
	o.setDefaults()
	k := &keeper{
		o: o, log: o.Logger, calls: make(chan task), over: make(chan struct{}), signals: make(chan os.Signal, 16),
		unready: time.Now(),
	}
	signal.Notify(k.signals, passed()...)
	defer signal.Stop(k.signals)
	setOOM(k.log, os.Getpid(), keeperOOM)
	if k.manager, err = dialManager(k.log); err != nil {
		return 1, err
	}
	defer k.manager.close()
	if err := k.begin(ctx); err != nil {
		return 1, err
	}
	k.loop(ctx)
	return k.code, k.close()
}

// begin takes over what there is, or begins anew.
func (k *keeper) begin(ctx context.Context) error {
	resumed, err := k.resume()
	if resumed || err != nil {
		return err
	}
	if k.table, err = inherited(ctx, k.manager, k.log); err == nil && k.table == nil {
		k.table, err = newTable(k.manager)
	}
	if err != nil {
		return err
	}
	if len(k.table.items) > 0 {
		k.log.Info("keeper takes over what the service manager kept", "entries", len(k.table.items))
	}
	if k.current, err = k.start(nil, false); err != nil {
		return errors.Join(err, k.table.close(false))
	}
	k.manager.storeWorker(k.current.process)
	k.current.kill(time.Now().Add(k.o.ReadyTimeout), "it was not ready in time")
	return nil
}

// close ends what is left after the loop.
func (k *keeper) close() error {
	close(k.over)
	if k.next != nil {
		k.next.process.Kill() // it may be dead already
	}
	k.goroutines.Wait()
	k.dropExe(k.exe)
	if k.next != nil {
		k.dropExe(k.next.exe)
	}
	if k.release {
		k.manager.remove(workerName)
	}
	return k.table.close(k.release)
}

// A task is something for the loop to do.
type task struct {
	f    func()
	done chan struct{}
}

// post has the loop do f and waits for it; false: the loop has ended, f was not done.
func (k *keeper) post(f func()) bool {
	c := task{f, make(chan struct{})}
	select {
	case k.calls <- c:
		<-c.done
		return true
	case <-k.over:
		return false
	}
}

func (k *keeper) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for stop := ctx.Done(); !k.ended; {
		timer.Reset(k.untilDue(time.Now()))
		select {
		case c := <-k.calls:
			c.f()
			close(c.done)
		case s := <-k.signals:
			k.signal(s)
		case <-stop:
			stop = nil
			k.signal(syscall.SIGTERM)
		case <-timer.C:
			k.act(time.Now())
		}
		if k.replace && !k.ended {
			k.replace = false
			k.becomeNew()
		}
	}
}

// untilDue is how long nothing is to be done by itself.
func (k *keeper) untilDue(now time.Time) time.Duration {
	due := now.Add(time.Hour)
	for _, t := range []time.Time{k.restartAt, k.pingAt, k.current.due(), k.next.due(), k.current.lookAt()} {
		if !t.IsZero() && t.Before(due) {
			due = t
		}
	}
	return due.Sub(now)
}

// act does what is due.
func (k *keeper) act(now time.Time) {
	isDue := func(t time.Time) bool { return !t.IsZero() && !t.After(now) }
	for _, w := range []*worker{k.current, k.next} {
		if isDue(w.due()) {
			k.log.Warn("worker is killed", "pid", w.process.Pid, "why", w.killWhy)
			w.killAt, w.killed = time.Time{}, true
			w.process.Kill() // it may be dead already
		}
	}
	if isDue(k.current.lookAt()) {
		k.look(k.current, now)
	}
	if isDue(k.restartAt) {
		k.restart()
	}
	if isDue(k.pingAt) {
		k.pingAt = now.Add(k.manager.ping)
		// A worker that cannot be brought back is the service manager's affair.
		if k.unready.IsZero() || now.Sub(k.unready) < k.o.ReadyTimeout+k.o.Backoff.Max {
			k.live()
		}
	}
}

// live gives a sign of life. A service manager that was started anew has everything stored.
func (k *keeper) live() {
	k.manager.say("WATCHDOG=1")
	if !k.manager.returned() {
		return
	}
	k.table.storeAll()
	if k.current != nil {
		k.manager.storeWorker(k.current.process)
	}
	k.manager.say("READY=1")
	k.manager.say("WATCHDOG=1")
}

// due is when w is to be killed.
func (w *worker) due() time.Time {
	if w == nil {
		return time.Time{}
	}
	return w.killAt
}

// restart starts a worker in the place of a dead one.
func (k *keeper) restart() {
	k.restartAt = time.Time{}
	w, err := k.start(k.exe, false)
	if err != nil {
		k.log.Error("worker does not start", "err", err)
		k.restartLater(time.Now())
		return
	}
	k.log.Info("worker is started", "pid", w.process.Pid, "entries", len(k.table.items))
	k.current = w
	k.manager.storeWorker(w.process)
	w.kill(time.Now().Add(k.o.ReadyTimeout), "it was not ready in time")
}

func (k *keeper) restartLater(now time.Time) {
	k.restartAt = now.Add(k.o.Backoff.pause(k.failures))
	k.failures++
}

// exited follows the end of w's process and of everything it had asked for.
func (k *keeper) exited(w *worker, state *os.ProcessState, err error) {
	how := fmt.Sprint(state)
	if err != nil {
		how = err.Error()
	}
	now := time.Now()
	if w == k.next {
		k.lostNext(how)
		return
	}
	k.asker = nil              // it was current
	fellBack := w.exe != k.exe // a successor that took over and was never ready
	if fellBack {
		k.dropExe(w.exe)
	}
	if w.ready {
		k.unready = now
		if w.yields || now.Sub(w.readyAt) >= k.o.Backoff.Stable {
			k.failures = 0
		}
	}
	early := !k.served && (k.end != nil || state != nil && state.Exited())
	switch {
	case w.ending || early:
		k.finish(exitCode(state), w.ending)
		return
	case k.next != nil && k.agreed:
		k.current = nil
		k.promote()
		return
	case k.next != nil: // it was asked for by who is dead
		k.next.kill(now, "its predecessor died before it could take over")
	}
	k.current = nil
	if w.yields {
		k.log.Info("worker has ended for its successor", "pid", w.process.Pid)
	} else {
		k.log.Error("worker died", "pid", w.process.Pid, "how", how, "again", fellBack)
	}
	k.restartLater(now)
}

// finish ends the loop.
func (k *keeper) finish(code int, release bool) { k.ended, k.code, k.release = true, code, release }

// exitCode is what a shell says of a process that ended.
func exitCode(state *os.ProcessState) int {
	if state == nil {
		return 1
	}
	if s, ok := state.Sys().(syscall.WaitStatus); ok && s.Signaled() {
		return 128 + int(s.Signal())
	}
	return state.ExitCode()
}

// signal passes s on, now or when a worker can take it: one that is not yet ready may not
// know it, and would die of it.
func (k *keeper) signal(s os.Signal) {
	ends := s == syscall.SIGTERM || s == syscall.SIGINT
	if ends {
		k.end = s
	}
	switch {
	case k.current != nil && (ends || k.current.ready):
		k.current.told = k.current.told || ends
		k.pass(s)
	case ends && !k.served && k.current == nil:
		k.finish(128+int(s.(syscall.Signal)), false)
	case !ends && !slices.Contains(k.pending, s):
		k.pending = append(k.pending, s)
	}
}

// passPending passes on what came while nobody could take it.
func (k *keeper) passPending() {
	if k.end != nil && !k.current.told {
		k.current.told = true
		k.pending = append(k.pending, k.end)
	}
	for _, s := range k.pending {
		k.pass(s)
	}
	k.pending = nil
}

func (k *keeper) pass(s os.Signal) {
	if err := k.current.process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		k.log.Warn("signal is not passed on to the worker", "signal", s, "err", err)
	}
}
