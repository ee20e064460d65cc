// Command worker serves a group that outlives it, for the tests of package fanotify,
// which kill it. It inherits the group (3), the journal (4) and the cache file (5),
// fills that from the file of its first argument, ends with its standard input, and
// prints its counters then.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/fanotify"
)

func main() {
	if err := run(os.Args[1], os.Getenv("WORKER_LATE") != ""); err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		os.Exit(3)
	}
}

func run(data string, late bool) error {
	journal := os.NewFile(4, "journal")
	o := fanotify.Options{Journal: journal, Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))}
	var err error
	if late { // numbers of events are in use already
		for range 40 {
			if _, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0); err != nil {
				return err
			}
		}
	} else if o.Reservation, err = fanotify.Reserve(journal); err != nil {
		return err
	}
	if err := syscall.SetNonblock(3, true); err != nil {
		return err
	}
	g, err := fanotify.NewGroupFromFile(os.NewFile(3, "group"), o)
	if err != nil {
		return err
	}
	defer g.Close()
	file := &file{f: os.NewFile(5, "cache file"), present: make(map[int64]bool)}
	if file.data, err = os.ReadFile(data); err != nil {
		return err
	}
	if err := g.Expect(file.f, file); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	if err := g.Serve(ctx); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(g.Stats())
}

// A file knows what it has filled itself, and nothing of its predecessors.
type file struct {
	f    *os.File
	data []byte

	mu      sync.Mutex // guards present
	present map[int64]bool
}

const page = 4096

func (f *file) Ready(off, n int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for at := off; at < min(off+n, int64(len(f.data))); at += page {
		if !f.present[at] {
			return false
		}
	}
	return true
}

func (f *file) Fill(_ context.Context, off, n int64) error {
	time.Sleep(rand.N(2 * time.Millisecond))
	for at := off; at < min(off+n, int64(len(f.data))); at += page {
		if _, err := f.f.WriteAt(f.data[at:min(at+page, int64(len(f.data)))], at); err != nil {
			return err
		}
		f.mu.Lock()
		f.present[at] = true
		f.mu.Unlock()
	}
	return nil
}
