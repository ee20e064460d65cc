// Package harness is what demo and bench share: it starts erofsd, runs programs
// inside an image as a container would, and drops cached pages.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/api"
)

const (
	startTimeout = 10 * time.Second
	stopTimeout  = 20 * time.Second
)

// Daemon is a running erofsd with a cache of its own.
type Daemon struct {
	*api.Client
	Root string // its cache

	cmd    *exec.Cmd
	exited chan struct{}
	log    *bytes.Buffer // until exited: written by the daemon
}

// StartDaemon starts the erofsd of the directory bin on the empty or used cache
// directory root, and returns when it answers.
func StartDaemon(ctx context.Context, bin, root string, args ...string) (*Daemon, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	socket := filepath.Join(root, "sock")
	d := &Daemon{Client: api.NewClient(socket), Root: root, exited: make(chan struct{}), log: new(bytes.Buffer)}
	d.cmd = exec.Command(filepath.Join(bin, "erofsd"), append([]string{"--root", root, "--socket", socket}, args...)...)
	d.cmd.Stderr = d.log
	// Ctrl-C is for us: we stop the daemon when nothing uses it any more.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start erofsd: %w", err)
	}
	go func() {
		defer close(d.exited)
		d.cmd.Wait() // its log says more than its exit status
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		_, err := d.Status(ctx)
		if err == nil {
			return d, nil
		}
		select {
		case <-d.exited:
			return nil, fmt.Errorf("erofsd does not start:\n%s", d.log)
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("erofsd does not answer: %w", err), d.Stop())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// PID is the process that was started: the keeper, where there is one.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Stop unmounts every image of the daemon and ends it. It does so although
// the caller's context has ended.
func (d *Daemon) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var errs []error
	if st, err := d.Status(ctx); err == nil {
		for _, m := range st.Images {
			if !m.Detached { // as one is of which another mount namespace has a copy for a moment
				errs = append(errs, d.Unmount(ctx, api.UnmountRequest{Mountpoint: m.Mountpoint}))
			}
		}
	}
	d.Close()
	d.cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	select {
	case <-d.exited:
	case <-ctx.Done():
		d.cmd.Process.Kill()
		<-d.exited
		errs = append(errs, fmt.Errorf("erofsd did not end in %s and was killed; its log:\n%s", stopTimeout, d.log))
	}
	return errors.Join(errs...)
}

// Image returns the state of the image that is mounted at mountpoint.
func (d *Daemon) Image(ctx context.Context, mountpoint string) (api.Mount, error) {
	st, err := d.Status(ctx)
	if err != nil {
		return api.Mount{}, err
	}
	for _, m := range st.Images {
		if m.Mountpoint == mountpoint {
			return m, nil
		}
	}
	return api.Mount{}, fmt.Errorf("erofsd has no image at %s", mountpoint)
}

// AwaitComplete returns when the image at mountpoint needs the daemon no more.
func (d *Daemon) AwaitComplete(ctx context.Context, mountpoint string) error {
	for {
		m, err := d.Image(ctx, mountpoint)
		if err != nil || m.Complete {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// clockTick is the unit of times in /proc/PID/stat, the same on every Linux.
const clockTick = time.Second / 100

// CPU returns the processor time that the daemon has used, its keeper's and its ended
// helper processes' included.
func (d *Daemon) CPU() (time.Duration, error) {
	var ticks int64
	err := d.each(func(pid int) error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return err
		}
		_, rest, _ := strings.Cut(string(stat), ") ") // the name before may hold anything
		fields := strings.Fields(rest)
		if len(fields) < 15 {
			return fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
		}
		for _, f := range fields[11:15] { // utime, stime, cutime, cstime
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return err
			}
			ticks += n
		}
		return nil
	})
	return time.Duration(ticks) * clockTick, err
}

// each calls do for the daemon's processes: the keeper and its worker, or the only one.
func (d *Daemon) each(do func(pid int) error) error {
	v, err := d.Version(context.Background())
	if err == nil {
		err = do(v.PID)
	}
	if err == nil && v.PID != d.PID() {
		err = do(d.PID())
	}
	return err
}

// Memory returns a size of the daemon, its keeper included, from /proc/PID/status in bytes:
// VmHWM is its peak so far, VmRSS its size now.
func (d *Daemon) Memory(field string) (sum int64, err error) {
	err = d.each(func(pid int) error {
		n, err := memory(pid, field)
		sum += n
		return err
	})
	return sum, err
}

func memory(pid int, field string) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no %s", pid, field)
}
