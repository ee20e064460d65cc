package daemon

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"time"
)

// timerSlack is how late a timer may be. Nothing here is exacter than milliseconds, but
// the Go runtime's monitor sleeps for 20 µs again and again while reads and writes of
// files are under way, which took 8 % of the processor time of a cold read; waking it
// when others wake as well takes 2 %.
const timerSlack = time.Millisecond

// RelaxTimers lets the kernel put timers of this process together (timerslack_ns,
// proc(5)). Threads that come later inherit it. Without the right it stays as it is.
func RelaxTimers(log *slog.Logger) {
	threads, err := os.ReadDir("/proc/self/task")
	for _, t := range threads {
		value := strconv.FormatInt(timerSlack.Nanoseconds(), 10)
		if werr := os.WriteFile("/proc/"+t.Name()+"/timerslack_ns", []byte(value), 0o600); !errors.Is(werr, fs.ErrNotExist) {
			err = errors.Join(err, werr)
		}
	}
	if err != nil {
		log.Debug("cannot relax timers; the daemon takes a little more processor time", "err", err)
	}
}
