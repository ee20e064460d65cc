package main

import (
	"cmp"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/erofsd"
	"github.com/erofsd/erofsd/internal/fdstore"
)

// storeName is the socket of the store of descriptors, beside the daemon's.
const storeName = "erofsd-notify"

// A mainProcess is erofsd's first process: its keeper, or the worker where there is none. It
// is one that was started here, by an earlier snapshotter, or by somebody else.
type mainProcess struct {
	asked bool // for signs of life, by this snapshotter
	ended chan struct{}
	err   error // how; set before ended is closed
}

func (m *mainProcess) hasEnded() bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

// onEnd has f called when the process ends, until stop was called.
func (m *mainProcess) onEnd(f func()) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-m.ended:
			f()
		case <-quit:
		}
	}()
	return func() { close(quit); <-done }
}

// open opens the store of what erofsd holds, where recover_policy is failover. What an
// earlier snapshotter has left is taken over, or let go of.
func (d *daemon) open(ctx context.Context, in *fdstore.Inherited, manager *fdstore.Manager) error {
	if d.c.Mode == modeConnect {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(d.c.Socket), 0o700); err != nil {
		return err
	}
	store, err := fdstore.Open(fdstore.Options{
		Path: filepath.Join(filepath.Dir(d.c.Socket), storeName), Inherited: in, Manager: manager, Logger: d.log,
	})
	if err != nil {
		return err
	}
	if d.c.RecoverPolicy != recoverFailover {
		store.Forget()
		return store.Close()
	}
	d.store = store
	fd, err := store.Main()
	if err != nil || fd < 0 {
		return err
	}
	d.setMain(ctx, processOf(fd))
	d.log.Info("the snapshotter before this one has left what erofsd holds", "descriptors", store.Len())
	return nil
}

// held is the number of descriptors with which another erofsd would go on.
func (d *daemon) held() int {
	if d.store == nil {
		return 0
	}
	return d.store.Len()
}

// adopt makes the main process of a worker known, unless one is that is alive or has left
// something.
func (d *daemon) adopt(ctx context.Context, worker *process) {
	if m := d.started(); d.c.Mode == modeConnect || m != nil && (!m.hasEnded() || d.held() > 0) {
		return
	}
	p, err := mainOf(worker)
	if err == nil && d.store != nil {
		err = p.with(d.store.SetMain)
	}
	if err != nil {
		d.log.Warn("erofsd's main process is not known; if it hangs nobody notices", "worker", worker.pid, "err", err)
		return
	}
	d.setMain(ctx, p)
}

// setMain makes the main process known; it is one that was not started here.
func (d *daemon) setMain(ctx context.Context, p *process) {
	m := &mainProcess{ended: make(chan struct{})}
	d.mu.Lock()
	d.main = m
	d.mu.Unlock()
	d.watching.Go(func() {
		defer p.close()
		if m.err = p.wait(ctx); ctx.Err() == nil {
			close(m.ended)
		}
	})
}

// start starts erofsd, with what the last one held, unless its main process still runs: that
// brings its worker back itself.
func (d *daemon) start(ctx context.Context) error {
	if m := d.started(); m != nil && !m.hasEnded() {
		return nil
	}
	cmd, err := d.command()
	if err != nil {
		return err
	}
	fresh := true
	if d.store == nil {
		err = cmd.Start()
	} else if err = d.store.Sync(ctx); err == nil {
		fresh = d.held() == 0
		err = d.store.Start(cmd, cmp.Or(d.watchdog, signTime))
	}
	if err != nil {
		return err
	}
	d.log.Info("started erofsd", "pid", cmd.Process.Pid, "held", d.held())
	m := &mainProcess{asked: d.store != nil, ended: make(chan struct{})}
	d.mu.Lock()
	d.main = m
	d.starts++
	d.fresh, d.since = fresh, time.Time{}
	d.mu.Unlock()
	go func() { // as long as it lives, also when we end before
		defer close(m.ended)
		m.err = cmd.Wait()
	}()
	return nil
}

// command is erofsd's.
func (d *daemon) command() (*exec.Cmd, error) {
	program, err := d.program()
	if err != nil {
		return nil, err
	}
	args := []string{"--root", d.c.Root, "--socket", d.c.Socket}
	if d.c.Config != "" {
		args = append([]string{"--config", d.c.Config}, args...)
	}
	cmd := exec.Command(program, append(args, d.c.Args...)...)
	if d.c.Mode == modeEmbedded {
		cmd.Args[0] = erofsd.Name
	}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.Env = withoutManager(os.Environ())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal to us is none to it
	return cmd, nil
}

// program is the path of erofsd: this program, which may be another one on the disk by now, or
// as configured, or beside this program, or in PATH.
func (d *daemon) program() (string, error) {
	if d.c.Mode == modeEmbedded {
		return "/proc/self/exe", nil
	}
	if d.c.Executable != "" {
		return exec.LookPath(d.c.Executable)
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "erofsd")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	return exec.LookPath("erofsd")
}

// started returns the main process, nil if it is not known.
func (d *daemon) started() *mainProcess {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.main
}

// forgetFresh lets go of what a daemon has stored that was given nothing, and has ended
// before it answered: there is nothing to go on with.
func (d *daemon) forgetFresh(ctx context.Context) {
	d.mu.Lock()
	fresh := d.fresh
	d.mu.Unlock()
	if d.store == nil || !fresh || !d.hasEnded() {
		return
	}
	if err := d.store.Sync(ctx); err == nil {
		d.store.Forget()
	}
}

// startsInVain is how often one was started since one answered.
func (d *daemon) startsInVain() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.starts
}

// hasEnded reports whether there is no main process that is known to run.
func (d *daemon) hasEnded() bool {
	m := d.started()
	return m == nil || m.hasEnded()
}

// wasSeen reports whether a daemon has answered.
func (d *daemon) wasSeen() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.seen
}

// listen kills the main process when it gives no sign of life for too long; then another
// one is started. It returns when ctx ends.
func (d *daemon) listen(ctx context.Context) {
	if d.store == nil || d.watchdog <= 0 {
		return
	}
	for wait(ctx, d.watchdog/4) {
		if !d.isSilent() {
			continue
		}
		// We may have been kept from hearing it ourselves.
		if err := d.store.Sync(ctx); err != nil || !d.isSilent() {
			continue
		}
		fd, err := d.store.Main()
		if err != nil || fd < 0 {
			continue
		}
		p := processOf(fd)
		d.log.Error("erofsd gives no sign of life, and is killed; another one goes on in its place", "for", d.watchdog)
		if err := p.kill(); err != nil && !errors.Is(err, syscall.ESRCH) {
			d.log.Error("kill erofsd", "err", err)
		}
		p.close()
	}
}

// isSilent reports whether a main process that runs should have given a sign of life. The
// first one is due as long after it began to answer as any.
func (d *daemon) isSilent() bool {
	d.mu.Lock()
	m, since := d.main, d.since
	d.mu.Unlock()
	beat := d.store.Beat()
	if beat.IsZero() && m != nil && m.asked {
		beat = since
	}
	return !beat.IsZero() && time.Since(beat) > d.watchdog && !d.hasEnded()
}
