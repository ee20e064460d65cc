package keeper

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// request does what w asks. With late the answer comes by w.push.
func (k *keeper) request(w *worker, m message) (late bool, err error) {
	// A descriptor that was not put away is not kept.
	defer func() {
		if m.op != opPut || err != nil && !errors.As(err, new(*tableError)) {
			closeAll(m.files())
		}
	}()
	switch {
	case m.op == opAlive:
		k.alive(w)
		return false, nil
	case m.op == opHello:
		return k.hello(w, m)
	case m.op == opEnd:
		return false, k.ending(w)
	case m.op > opEnd:
		return false, fmt.Errorf("operation %d is not a worker's", m.op)
	case w != k.current || !w.greeted:
		return false, errors.New("the worker has not received what is held (Entries): do that first")
	case w.ending:
		return false, errors.New("the worker is ending")
	}
	switch m.op {
	case opPut:
		if err := k.table.put(m.name, m.data, m.fd); err != nil {
			return false, &tableError{err}
		}
	case opDrop:
		return false, k.table.drop(m.name)
	case opReady:
		k.isReady(w)
	case opUpgrade:
		return k.upgrade(w, m)
	case opAbort:
		k.abort()
	case opYield:
		w.yields = true
		w.kill(time.Now().Add(k.o.YieldTimeout), "it did not end after Yield")
	}
	return false, nil
}

// A tableError is an error of table.put, which has taken the descriptor.
type tableError struct{ error }

// hello notes that w is there. Its answer brings what is held.
func (k *keeper) hello(w *worker, m message) (late bool, err error) {
	if w.helloed {
		return false, errors.New("the worker has said hello before")
	}
	w.helloed, w.helloID = true, m.id
	why := ""
	switch {
	case m.data[0] != format:
		why = fmt.Sprintf("the successor speaks protocol %d, this keeper %d", m.data[0], format)
	case w == k.next && m.name != k.o.StateVersion:
		why = fmt.Sprintf("the successor has state version %q, this worker %q", m.name, k.o.StateVersion)
	}
	switch {
	case why != "":
		err := errors.New(why + ": restart the service instead")
		if w == k.next {
			k.refuse(err)
		}
		return false, err
	case w == k.next:
		k.agree()
	case w != k.current:
		return false, errors.New("the worker has no keeper any more")
	default:
		k.greet(w)
	}
	return true, nil
}

// ending notes that w ends in order.
func (k *keeper) ending(w *worker) error {
	if w != k.current {
		return errors.New("a successor that has not taken over cannot end in order")
	}
	w.ending = true
	w.spare() // how long it takes is the service manager's affair
	k.manager.say("STOPPING=1")
	return nil
}

// isReady notes that w serves.
func (k *keeper) isReady(w *worker) {
	if w.ready {
		return
	}
	w.ready, w.readyAt, k.unready = true, time.Now(), time.Time{}
	w.spare()
	if !k.served {
		k.served = true
		k.manager.say("READY=1")
		k.startPings()
	}
	if w.exe != k.exe {
		k.dropExe(k.exe)
		k.exe, k.replace = w.exe, true
		k.failures = 0
	}
	k.passPending()
}

func (k *keeper) startPings() {
	if k.manager != nil && k.manager.ping > 0 {
		k.pingAt = time.Now()
	}
}

// upgrade starts a successor, which stands by.
func (k *keeper) upgrade(w *worker, m message) (late bool, err error) {
	switch {
	case !w.ready:
		return false, errors.New("the worker is not ready itself: wait for that")
	case k.next != nil || w.busy():
		return false, errors.New("an upgrade is under way: wait for its end")
	case w.yields:
		return false, errors.New("the worker has yielded")
	}
	exe, err := openExecutable(string(m.data))
	if err != nil {
		return false, err
	}
	next, err := k.start(exe, true)
	if err != nil {
		return false, errors.Join(err, exe.Close())
	}
	k.next, k.asker, k.askID, k.agreed = next, w, m.id, false
	next.kill(time.Now().Add(k.o.HelloTimeout), "it did not say hello in time")
	k.log.Info("successor is started", "pid", next.process.Pid)
	return true, nil
}

// openExecutable opens a file that can be executed, so that it stays what it is.
func openExecutable(path string) (*os.File, error) {
	f, err := os.OpenFile(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0) {
		err = fmt.Errorf("%s has mode %v: it must be an executable file", path, info.Mode())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// agree answers the Upgrade: from now on current has to go.
func (k *keeper) agree() {
	if k.asker == nil {
		return // the upgrade was given up, and next is being killed
	}
	k.agreed = true
	k.next.spare()
	k.current.kill(time.Now().Add(k.o.YieldTimeout), "it did not yield to its successor")
	k.answerUpgrade(nil)
}

// refuse ends an upgrade that has not begun to take effect.
func (k *keeper) refuse(err error) {
	k.next.kill(time.Now(), err.Error())
	k.answerUpgrade(err)
}

// abort gives up an upgrade, unless current has already yielded.
func (k *keeper) abort() {
	if k.next == nil || k.current.yields {
		return
	}
	k.agreed = false
	k.current.spare()
	k.refuse(errors.New("the upgrade was given up"))
}

func (k *keeper) answerUpgrade(err error) {
	if w, id := k.asker, k.askID; w != nil {
		k.asker = nil
		w.push(func() error { return w.answer(id, err) })
	}
}

// lostNext follows the end of a successor that has not taken over.
func (k *keeper) lostNext(how string) {
	k.log.Error("successor died before it could take over", "pid", k.next.process.Pid, "how", how)
	why := how
	if k.next.killed {
		why = k.next.killWhy
	}
	k.dropExe(k.next.exe)
	k.next, k.agreed = nil, false
	k.answerUpgrade(fmt.Errorf("the successor ended before it was ready to take over: %s", why))
}

// promote lets the successor go on, now that its predecessor is dead.
func (k *keeper) promote() {
	w := k.next
	k.log.Info("successor takes over", "pid", w.process.Pid, "entries", len(k.table.items))
	k.current, k.next, k.agreed = w, nil, false
	k.manager.storeWorker(w.process)
	w.kill(time.Now().Add(k.o.ReadyTimeout), "it was not ready in time")
	k.greet(w)
}

// dropExe closes an executable that is not needed any more; nil is the keeper's own.
func (k *keeper) dropExe(f *os.File) {
	if f != nil {
		f.Close() // nothing was written to it
	}
}
