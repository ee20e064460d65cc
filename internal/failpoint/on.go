//go:build failpoint

package failpoint

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const env = "EROFSD_FAILPOINT"

// A point is what shall happen at one place.
type point struct {
	action string
	at     int64 // the hit at which it does
	hits   atomic.Int64
}

var points = sync.OnceValue(func() map[string]*point {
	text, err := script(os.Getenv(env))
	var list map[string]*point
	if err == nil {
		list, err = parse(text)
	}
	if err != nil {
		panic(fmt.Sprintf("read %s: %v", env, err))
	}
	return list
})

// Enabled says that the build has the tag failpoint.
const Enabled = true

// Hit marks a place where a test may kill the process. It is safe for concurrent
// use.
func Hit(name string) {
	p := points()[name]
	if p == nil || p.hits.Add(1) != p.at {
		return
	}
	switch p.action {
	case "kill":
		raise(syscall.SIGKILL)
		stay()
	case "oom":
		exhaust()
	case "segv":
		raise(syscall.SIGSEGV)
		stay()
	case "exit":
		os.Exit(1)
	case "panic":
		panic("failpoint " + name)
	case "sleep":
		stay()
	case "stop":
		raise(syscall.SIGSTOP)
	}
}

// script returns what this process shall do. "@FILE" names a file with a line for each
// process: whoever comes takes the first away, and does nothing when none is left.
func script(s string) (string, error) {
	name, isFile := strings.CutPrefix(s, "@")
	if !isFile {
		return s, nil
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	line, rest, _ := strings.Cut(string(text), "\n")
	return line, os.WriteFile(name, []byte(rest), 0o600)
}

func raise(s syscall.Signal) {
	if err := syscall.Kill(os.Getpid(), s); err != nil {
		panic(fmt.Sprintf("send %v to itself: %v", s, err))
	}
}

// exhaust takes memory until the process is killed for it.
func exhaust() {
	var all [1 << 10][]byte
	for i := range all {
		all[i] = bytes.Repeat([]byte{1}, 1<<20)
	}
	runtime.KeepAlive(all)
	panic("a gigabyte was taken, and the kernel killed nobody: want a cgroup with a limit")
}

// stay never returns: a signal may come a little after it was sent.
func stay() {
	for {
		time.Sleep(time.Hour)
	}
}

func parse(s string) (map[string]*point, error) {
	list := make(map[string]*point)
	for item := range strings.SplitSeq(s, ",") {
		if item == "" {
			continue
		}
		name, what, _ := strings.Cut(item, "=")
		action, at, counted := strings.Cut(what, "@")
		p := &point{action: action, at: 1}
		if !slices.Contains(Names, name) {
			return nil, fmt.Errorf("%q: no place of this name: want one of %q", item, Names)
		}
		if list[name] != nil {
			return nil, fmt.Errorf("%q: %s is there twice", item, name)
		}
		if !slices.Contains([]string{"kill", "oom", "segv", "exit", "panic", "sleep", "stop"}, action) {
			return nil, fmt.Errorf("%q: no such action", item)
		}
		if counted {
			n, err := strconv.ParseInt(at, 10, 64)
			if err != nil || n < 1 {
				return nil, fmt.Errorf("%q: want the number of a hit after @, from 1", item)
			}
			p.at = n
		}
		list[name] = p
	}
	return list, nil
}
