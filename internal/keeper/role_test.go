package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// options are the Options that a test sets, through the environment.
type options struct {
	Ready, Hello, Yield time.Duration
	Hang                time.Duration
	Backoff             Backoff
	Version             string
}

func keeperMain() int {
	var o options
	if err := json.Unmarshal([]byte(os.Getenv(envOptions)), &o); err != nil {
		panic(err)
	}
	if os.Getenv("LISTEN_PID") == "self" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	code, err := Run(context.Background(), Options{
		Command: func(exe string) *exec.Cmd {
			if exe == "" {
				exe = "/proc/self/exe"
			}
			cmd := exec.Command(exe)
			cmd.Env = append(os.Environ(), envRole+"=worker")
			cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
			return cmd
		},
		Logger:  slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Backoff: o.Backoff, ReadyTimeout: o.Ready, HelloTimeout: o.Hello, YieldTimeout: o.Yield, HangTimeout: o.Hang, StateVersion: o.Version,
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "keeper:", err)
	}
	return code
}

// An order is what a test has a worker do; the worker answers each with a report.
type order struct {
	Do, Name, Data, Path string
	N                    int
}

type report struct {
	PID     int
	Build   string
	Err     string
	Entries []held
	Text    string
	N       int
}

// A held is an Entry as a worker sees it: Offset is the open file's, not the descriptor's.
type held struct {
	Name, Data, Target string
	Offset             int64
}

// workerMain does what the test orders until the test is gone.
func workerMain() int {
	control, err := net.Dial("unix", os.Getenv(envControl))
	if err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 90
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passed()...)
	c, err := Connect()
	if err != nil || c == nil {
		fmt.Fprintln(os.Stderr, "worker: no keeper:", err)
		return 91
	}
	c.StateVersion = os.Getenv(envVersion)
	orders, reports := json.NewDecoder(control), json.NewEncoder(control)
	for {
		var o order
		if err := orders.Decode(&o); err != nil {
			return 92
		}
		r := report{PID: os.Getpid(), Build: os.Getenv(envBuild)}
		if err := obey(c, o, &r, signals); err != nil {
			r.Err = err.Error()
		}
		if err := reports.Encode(r); err != nil {
			return 93
		}
	}
}

func obey(c *Client, o order, r *report, signals chan os.Signal) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	switch o.Do {
	case "hello":
		return nil
	case "entries":
		list, err := c.Entries(ctx)
		for _, e := range list {
			h := held{Name: e.Name, Data: string(e.Data)}
			if e.File != nil {
				h.Offset, _ = e.File.Seek(0, io.SeekCurrent)
				h.Target, _ = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", e.File.Fd()))
			}
			if e.Name == journalName && e.File != c.Journal() {
				return errors.New("the journal is listed as another file")
			}
			r.Entries = append(r.Entries, h)
		}
		return err
	case "put":
		return put(ctx, c, o)
	case "fill": // N entries of files, from 8 goroutines
		failed := make(chan error)
		for g := range 8 {
			go func() {
				var err error
				for i := g; i < o.N; i += 8 {
					name := fmt.Sprintf("%s%04d", o.Name, i)
					err = errors.Join(err, put(ctx, c, order{Name: name, Data: name, Path: o.Path, N: i}))
				}
				failed <- err
			}()
		}
		var err error
		for range 8 {
			err = errors.Join(err, <-failed)
		}
		return err
	case "drop":
		return c.Drop(ctx, o.Name)
	case "live": // gives N signs of life, 0: for ever
		if c.AliveEvery() == 0 {
			return errors.New("none are wanted")
		}
		go func() {
			for n := 1; n != o.N; n++ {
				time.Sleep(c.AliveEvery())
				if c.Alive(context.Background()) != nil {
					return
				}
			}
		}()
		return c.Alive(ctx)
	case "ready":
		return c.Ready(ctx)
	case "end":
		return c.End(ctx)
	case "yield":
		return c.Yield(ctx)
	case "close":
		return c.Close()
	case "upgrade":
		if o.N > 0 {
			ctx, cancel = context.WithTimeout(ctx, time.Duration(o.N)*time.Millisecond)
			defer cancel()
		}
		return c.Upgrade(ctx, o.Path)
	case "journal":
		if c.Journal() == nil {
			return errors.New("none")
		}
		_, err := fmt.Fprint(c.Journal(), o.Data)
		return err
	case "returns":
		if c.Returns() {
			r.N = 1
		}
	case "gone":
		select {
		case <-c.Gone():
		case <-ctx.Done():
			return ctx.Err()
		}
	case "signal":
		select {
		case s := <-signals:
			r.Text = s.String()
		case <-ctx.Done():
			return ctx.Err()
		}
	case "fds":
		list, err := os.ReadDir("/proc/self/fd")
		r.N = len(list)
		return err
	case "env":
		r.Text = strings.Join(os.Environ(), "\n")
	case "exit":
		os.Exit(o.N)
	case "panic":
		panic("as ordered")
	case "die":
		// Go has handlers for nearly all signals, a shell has none.
		return syscall.Exec("/bin/sh", []string{"sh", "-c", fmt.Sprintf("kill -%d $$", o.N)}, nil)
	}
	return nil
}

// put puts a file whose offset is o.N, or no file without a path.
func put(ctx context.Context, c *Client, o order) error {
	e := Entry{Name: o.Name, Data: []byte(o.Data)}
	if o.Path != "" {
		f, err := os.OpenFile(o.Path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.Seek(int64(o.N), io.SeekStart); err != nil {
			return err
		}
		e.File = f
	}
	return c.Put(ctx, e)
}
