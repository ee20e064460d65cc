package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/snapshotter"
)

// A daemon is erofsd at a socket: one that runs, or that is started and started again. It
// outlives the snapshotter, and is found again by the next one.
type daemon struct {
	*api.Client
	c     daemonConfig
	log   *slog.Logger
	event func(name string) // is told that it is RUNNING, or has DIED

	mu    sync.Mutex    // guards what follows
	up    chan struct{} // closed while the daemon answers
	why   error         // it does not; nil: it was not asked yet
	child *child        // the last one that was started here, nil if none was
}

var _ snapshotter.Mounter = (*daemon)(nil)

// A child is a daemon that was started here.
type child struct {
	ended chan struct{}
	err   error // how; set before ended is closed
}

func newDaemon(c daemonConfig, log *slog.Logger, event func(name string)) *daemon {
	return &daemon{Client: api.NewClient(c.Socket), c: c, log: log, event: event, up: make(chan struct{})}
}

// Times of the daemon's life.
const (
	askTime      = 5 * time.Second  // for an answer to the question who it is
	startTime    = 30 * time.Second // until one that was started answers
	graceTime    = 3 * time.Second  // until a keeper has started the next worker
	lostTime     = 10 * time.Second // without an answer, until it is taken for dead with its keeper
	askPause     = 20 * time.Millisecond
	restartPause = 200 * time.Millisecond // before another start; it doubles
	restartMax   = 5 * time.Second        // up to this
	longLife     = time.Minute            // of a daemon, after which the pause is the shortest again
	patience     = 30 * time.Second       // of who wants an image while there is no daemon
)

// BindImage waits until there is a daemon, for it or Status is the first thing that is asked
// of it for an image.
func (d *daemon) BindImage(ctx context.Context, r api.BindRequest) error {
	if err := d.await(ctx); err != nil {
		return err
	}
	return d.Client.BindImage(ctx, r)
}

// Status waits as BindImage does.
func (d *daemon) Status(ctx context.Context) (api.Status, error) {
	if err := d.await(ctx); err != nil {
		return api.Status{}, err
	}
	return d.Client.Status(ctx)
}

// await returns when the daemon answers, or says why it does not.
func (d *daemon) await(ctx context.Context) error {
	d.mu.Lock()
	up := d.up
	d.mu.Unlock()
	patient := time.NewTimer(patience)
	defer patient.Stop()
	select {
	case <-up:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-patient.C:
		d.mu.Lock()
		defer d.mu.Unlock()
		return fmt.Errorf("erofsd does not answer at %s: %w", d.c.Socket, cmp.Or(d.why, errors.New("it is being started")))
	}
}

// A vigil is what watch remembers.
type vigil struct {
	grace  time.Duration // for a keeper; none before one was seen
	pause  time.Duration // before the next attempt
	silent time.Time     // when one answered last
}

// watch sees to it that there is a daemon until ctx ends. It calls started each time that
// there is another one, and lost when there is none and none can be started.
func (d *daemon) watch(ctx context.Context, started func(), lost func() error) {
	v := vigil{pause: restartPause, silent: time.Now()}
	for ctx.Err() == nil {
		p, err := d.reach(ctx, v.grace)
		switch {
		case err == nil:
			d.accompany(ctx, &v, p, started)
		case ctx.Err() == nil:
			d.miss(ctx, &v, err, lost)
		}
	}
}

// accompany waits for the end of the daemon that answers.
func (d *daemon) accompany(ctx context.Context, v *vigil, p *process, started func()) {
	defer p.close()
	born := time.Now()
	failpoint.Hit("grpc.daemon.answers")
	d.mu.Lock()
	close(d.up)
	d.mu.Unlock()
	started()
	d.event("RUNNING")
	d.log.Info("erofsd answers", "socket", d.c.Socket, "pid", p.pid)
	err := p.wait(ctx)
	d.mu.Lock()
	d.up, d.why = make(chan struct{}), nil
	d.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	d.event("DIED")
	d.log.Warn("erofsd's process has ended", "pid", p.pid, "err", err)
	failpoint.Hit("grpc.daemon.ended")
	v.silent, v.grace = time.Now(), graceTime
	if v.silent.Sub(born) > longLife {
		v.pause = restartPause
	}
}

// miss waits before the next attempt to reach a daemon.
func (d *daemon) miss(ctx context.Context, v *vigil, why error, lost func() error) {
	d.mu.Lock()
	d.why = why
	d.mu.Unlock()
	d.log.Error("there is no daemon; lazy images cannot be started", "err", why, "again_in", v.pause)
	pause := v.pause
	v.pause = min(2*v.pause, restartMax)
	if d.c.Mode == modeStart && time.Since(v.silent) > lostTime && d.nobodyListens() {
		if err := lost(); err != nil {
			d.log.Warn("unmount the images of a daemon that is gone", "err", err)
		}
		pause = restartPause // it may be that which kept another one from starting
	}
	wait(ctx, pause)
}

// reach returns the process of the daemon that answers. One that has ended may have a
// keeper, which is faster than we are; after that grace it is started.
func (d *daemon) reach(ctx context.Context, grace time.Duration) (*process, error) {
	p, err := d.answer(ctx, grace)
	if err == nil || d.c.Mode != modeStart || ctx.Err() != nil {
		return p, err
	}
	failpoint.Hit("grpc.daemon.start")
	if err := d.start(); err != nil {
		return nil, fmt.Errorf("start erofsd: %w", err)
	}
	failpoint.Hit("grpc.daemon.started")
	return d.answer(ctx, startTime)
}

// nobodyListens reports whether there is no daemon, not even one that is too busy to answer.
func (d *daemon) nobodyListens() bool {
	c, err := net.DialTimeout("unix", d.c.Socket, askTime)
	if err == nil {
		c.Close()
		return false
	}
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist)
}

// answer asks the daemon who it is until it says that, the child has ended, or the time is
// over; it asks once at least.
func (d *daemon) answer(ctx context.Context, most time.Duration) (*process, error) {
	enough, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		p, err := d.identify(ctx)
		if err == nil {
			return p, nil
		}
		if c := d.started(); c != nil && c.hasEnded() {
			return nil, fmt.Errorf("erofsd has ended: %w", cmp.Or(c.err, err))
		}
		if !wait(enough, askPause) {
			return nil, err
		}
	}
}

// identify opens the process that answers at the socket.
func (d *daemon) identify(ctx context.Context) (*process, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	v, err := d.Version(ctx)
	if err != nil {
		return nil, err
	}
	p, err := openProcess(v.PID)
	if err != nil {
		return nil, err
	}
	again, err := d.Version(ctx) // the number may have become another's before it was opened
	if err == nil && again.PID != v.PID {
		err = errors.New("it was replaced this moment")
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// start starts erofsd, unless the one that was started last still runs.
func (d *daemon) start() error {
	if c := d.started(); c != nil && !c.hasEnded() {
		return nil
	}
	program, err := d.program()
	if err != nil {
		return err
	}
	args := []string{"--root", d.c.Root, "--socket", d.c.Socket}
	if d.c.Config != "" {
		args = append([]string{"--config", d.c.Config}, args...)
	}
	cmd := exec.Command(program, append(args, d.c.Args...)...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.Env = withoutManager(os.Environ())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal to us is none to it
	if err := cmd.Start(); err != nil {
		return err
	}
	d.log.Info("started erofsd", "pid", cmd.Process.Pid)
	c := &child{ended: make(chan struct{})}
	d.mu.Lock()
	d.child = c
	d.mu.Unlock()
	go func() { // as long as it lives, also when we end before
		defer close(c.ended)
		c.err = cmd.Wait()
	}()
	return nil
}

// program is the path of erofsd: as configured, or beside this program, or in PATH.
func (d *daemon) program() (string, error) {
	if d.c.Executable != "" {
		return d.c.Executable, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "erofsd")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	return exec.LookPath("erofsd")
}

// started returns the last child.
func (d *daemon) started() *child {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.child
}

func (c *child) hasEnded() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// close drops connections.
func (d *daemon) close() {
	if err := d.Close(); err != nil {
		d.log.Debug("close connections to erofsd", "err", err)
	}
}

// wait returns false when ctx ends before the time is over.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
