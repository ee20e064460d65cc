package testenv

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// leakPatience is how long goroutines and descriptors of the tests may need to
// go away after the last test: connections and timers end a little later than
// the Close that ends them.
const leakPatience = 3 * time.Second

// Main runs the tests of a package and fails the run when they leave goroutines
// or file descriptors behind; it prints the stack or the target of each. Call it
// as the whole of TestMain:
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
// It does not return. A run that fails anyhow and a fuzzing run are not checked. Each of
// after is called when the tests have ended.
func Main(m *testing.M, after ...func()) {
	routines, files := goroutines(), openFiles()
	code := m.Run()
	for _, do := range after {
		do()
	}
	if code == 0 && !fuzzing() {
		if left := leaks(routines, files, leakPatience); len(left) > 0 {
			fmt.Fprintf(os.Stderr, "FAIL: the tests left behind:\n%s\n", strings.Join(left, "\n"))
			code = 1
		}
	}
	os.Exit(code)
}

func fuzzing() bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != "" && f.Value.String() != "false" {
			return true
		}
	}
	return false
}

// leaks describes every goroutine and descriptor that is not in the given
// baselines and does not go away in time.
func leaks(goroutinesBefore, filesBefore map[string]string, patience time.Duration) []string {
	deadline := time.Now().Add(patience)
	for {
		left := append(added(goroutinesBefore, goroutines()), added(filesBefore, openFiles())...)
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func added(before, after map[string]string) []string {
	var list []string
	for id, what := range after {
		if _, ok := before[id]; !ok {
			list = append(list, what)
		}
	}
	slices.Sort(list)
	return list
}

// openFiles describes every open descriptor, by number and target. The runtime
// opens its poller at the first use and keeps it, so that does not count.
func openFiles() map[string]string {
	files := make(map[string]string)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return files
	}
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || target == "anon_inode:[eventpoll]" || target == "anon_inode:[eventfd]" {
			continue // the first is the descriptor ReadDir had open
		}
		what := "file descriptor " + e.Name() + ": " + target
		files[what] = what
	}
	return files
}

// goroutines returns the stack of every goroutine by its number. The caller's and
// those that the standard library keeps for ever do not count.
func goroutines() map[string]string {
	buf := make([]byte, 64<<10)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	found := make(map[string]string)
	for i, s := range strings.Split(string(buf), "\n\n") {
		number, _, _ := strings.Cut(strings.TrimPrefix(s, "goroutine "), " ")
		if i == 0 || strings.Contains(s, "os/signal.loop") || strings.Contains(s, "testing.(*M).startAlarm") {
			continue
		}
		found[number] = s
	}
	return found
}
