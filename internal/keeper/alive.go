package keeper

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

// A worker that is stopped, or in which nothing goes on any more, does not die by itself,
// and its readers would wait for ever. So a worker gives signs of life (Client.Alive), and
// the keeper looks for them now and then. It counts its own looks and not the time: when
// all of the machine stands still, sleeps or has no processor to give, nobody looks either.

// envAlive tells a worker how often it has to give a sign of life.
const envAlive = "EROFSD_KEEPER_ALIVE"

const (
	// looksWithout is how many looks in a row without a sign of life end a worker.
	looksWithout = 4
	// signsPerLook is how many signs there are between two looks.
	signsPerLook = 2
	// lastWords is how long a worker may take to say where it hangs.
	lastWords = time.Second
)

// A watch is what the keeper has seen of a worker's life.
type watch struct {
	every  time.Duration // between two looks, 0: nobody looks
	at     time.Time     // of the next look, zero: it has not given a sign yet
	sign   bool          // there was one since the last look
	missed int           // looks in a row without one
	spared bool          // it was said that a debugger has it
}

// alive notes a sign of life. An executable from before there were any gives none, and is
// not watched.
func (k *keeper) alive(w *worker) {
	w.watch.sign = true
	if w.watch.at.IsZero() && w.watch.every > 0 {
		w.watch.at = time.Now().Add(w.watch.every)
	}
}

// lookAt is when to look at w, zero: it is not watched.
func (w *worker) lookAt() time.Time {
	if w == nil || !w.ready || w.ending || w.yields || w.killed {
		return time.Time{} // there are other limits for these
	}
	return w.watch.at
}

// look looks for a sign of life of w.
func (k *keeper) look(w *worker, now time.Time) {
	v := &w.watch
	v.at = now.Add(v.every)
	switch {
	case v.sign:
		v.sign, v.missed, v.spared = false, 0, false
		return
	case traced(w.process.Pid):
		if !v.spared {
			k.log.Warn("worker gives no sign of life, but a debugger has it", "pid", w.process.Pid)
		}
		v.missed, v.spared = 0, true
		return
	}
	if v.missed++; v.missed < looksWithout {
		return
	}
	why := fmt.Sprintf("it has given no sign of life for %v", looksWithout*v.every)
	k.log.Error("worker hangs", "pid", w.process.Pid, "why", why)
	// The runtime answers this with what every goroutine does, unless it is stopped too.
	_ = w.process.Signal(syscall.SIGQUIT) // it may be dead already
	v.at = time.Time{}
	w.kill(now.Add(lastWords), why)
}

// traced reports whether a debugger has the process.
func traced(pid int) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if tracer, ok := strings.CutPrefix(s.Text(), "TracerPid:"); ok {
			return strings.TrimSpace(tracer) != "0"
		}
	}
	return false
}
