package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// A vigil is what watch remembers.
type vigil struct {
	grace  time.Duration // for a keeper; none before one was seen
	pause  time.Duration // before the next attempt
	silent time.Time     // when one answered last
	told   bool          // that none is started any more
}

// watch sees to it that there is a daemon until ctx ends. It calls started each time that
// there is another one, or is to be, and lost when there is none and none can be started.
func (d *daemon) watch(ctx context.Context, started func(), lost func() error) {
	d.watching.Go(func() { d.listen(ctx) })
	defer d.watching.Wait()
	v := vigil{pause: restartPause, silent: time.Now()}
	for ctx.Err() == nil {
		p, err := d.reach(ctx, v.grace)
		switch {
		case err == nil:
			d.accompany(ctx, &v, p, started)
		case ctx.Err() != nil:
		case errors.Is(err, errNotAgain):
			d.leave(ctx, &v, err)
		default:
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
	first := !d.seen
	d.seen, d.over, d.starts, d.fresh, d.since = true, nil, 0, false, born
	close(d.up)
	d.mu.Unlock()
	started()
	d.event("RUNNING")
	d.log.Info(d.title()+" answers", "socket", d.c.Socket, "pid", p.pid)
	d.adopt(ctx, p)
	if first && d.c.Mode == modeEmbedded {
		d.watching.Go(func() { d.unite(ctx) })
	}
	err := d.stay(ctx, p)
	d.mu.Lock()
	d.up, d.why = make(chan struct{}), nil
	d.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	d.event("DIED")
	if d.is() != d.erofsd {
		started() // who wants an image waits for the next one: nothing of a nydusd's outlives it
	}
	d.log.Warn(d.title()+"'s process has ended", "pid", p.pid, "err", err)
	failpoint.Hit("grpc.daemon.ended")
	v.silent, v.grace, v.told = time.Now(), graceTime, false
	if v.silent.Sub(born) > longLife {
		v.pause = restartPause
	}
}

// unite has an erofsd that an earlier snapshotter has left become this program, if it is
// another one: they are replaced together. One that somebody upgrades later is left alone.
func (d *daemon) unite(ctx context.Context) {
	err := d.become(ctx)
	// It may have a new worker this moment, or be upgraded.
	for pause := restartPause; err != nil && pause < graceTime && wait(ctx, pause); pause *= 2 {
		err = d.become(ctx)
	}
	if err != nil && ctx.Err() == nil {
		d.log.Warn("erofsd is another program than this one, and goes on as what it is; try again with erofsctl upgrade", "err", err)
	}
}

// become upgrades erofsd to this program, unless it is that.
func (d *daemon) become(ctx context.Context) error {
	v, err := d.Version(ctx)
	if err != nil {
		return err
	}
	ours, err := os.Stat("/proc/self/exe")
	theirs, terr := os.Stat(fmt.Sprintf("/proc/%d/exe", v.PID))
	if err = errors.Join(err, terr); err != nil || os.SameFile(ours, theirs) {
		return err
	}
	d.log.Info("erofsd becomes this program", "worker", v.PID)
	return d.Upgrade(ctx, api.UpgradeRequest{Executable: fmt.Sprintf("/proc/%d/exe", os.Getpid())})
}

// stay waits for the end of the process that answers. One that has lost its keeper is
// replaced, if what it held is stored here.
func (d *daemon) stay(ctx context.Context, p *process) error {
	m := d.started()
	if m == nil {
		return p.wait(ctx)
	}
	here, cancel := context.WithCancel(ctx)
	relieved := make(chan struct{})
	go func() {
		defer close(relieved)
		select {
		case <-m.ended:
			d.relieve(here, p.pid)
		case <-here.Done():
		}
	}()
	err := p.wait(ctx)
	cancel()
	<-relieved
	return err
}

// relieve starts another daemon in the place of a worker whose keeper is dead, until that
// has ended it, which is the end of ctx.
func (d *daemon) relieve(ctx context.Context, worker int) {
	if !wait(ctx, askPause) { // it ends as well
		return
	}
	if d.held() == 0 {
		d.log.Warn("erofsd's keeper has ended; its worker serves on alone", "worker", worker)
		return
	}
	for pause := restartPause; ; pause = min(2*pause, restartMax) {
		err := d.start(ctx)
		if m := d.started(); err == nil && m != nil {
			select {
			case <-m.ended:
				err = m.err
			case <-ctx.Done():
				return
			}
		}
		d.log.Error("erofsd's keeper has ended, and another one could not be started; the worker serves on alone", "worker", worker, "err", err, "again_in", pause)
		if !wait(ctx, pause) {
			return
		}
	}
}

// errNotAgain is about a daemon that died while recover_policy is none.
var errNotAgain = errors.New(`daemon.recover_policy is "none": it is not started again; start the snapshotter again, or another erofsd at its socket`)

// leave waits while nothing is to be done about a daemon that died.
func (d *daemon) leave(ctx context.Context, v *vigil, why error) {
	d.mu.Lock()
	d.over = why
	d.mu.Unlock()
	if !v.told {
		v.told = true
		d.log.Error("there is no daemon; lazy images cannot be started", "err", why)
	}
	wait(ctx, restartMax)
}

// miss waits before the next attempt to reach a daemon.
func (d *daemon) miss(ctx context.Context, v *vigil, why error, lost func() error) {
	d.mu.Lock()
	d.why = why
	d.mu.Unlock()
	d.log.Error("there is no daemon; lazy images cannot be started", "err", why, "again_in", v.pause)
	pause := v.pause
	v.pause = min(2*v.pause, restartMax)
	d.forgetFresh(ctx)
	switch silence := time.Since(v.silent); {
	case d.c.Mode == modeConnect || silence <= lostTime:
	case d.held() > 0:
		if silence > heldTime && d.startsInVain() > heldStarts && d.hasEnded() {
			d.log.Error("erofsd cannot be started with what the last one held, which is let go of: reads of what is not in the cache fail until images are mounted anew")
			d.store.Forget()
		}
	case d.nobodyListens():
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
	if err == nil || d.c.Mode == modeConnect || ctx.Err() != nil {
		return p, err
	}
	if d.c.RecoverPolicy == recoverNone && d.wasSeen() && d.hasEnded() {
		return nil, fmt.Errorf("erofsd has died, and %w", errNotAgain)
	}
	failpoint.Hit("grpc.daemon.start")
	if err := d.start(ctx); err != nil {
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

// answer asks the daemon who it is until it says that, its main process has ended, or the
// time is over; it asks once at least.
func (d *daemon) answer(ctx context.Context, most time.Duration) (*process, error) {
	enough, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		p, err := d.identify(ctx)
		if err == nil {
			return p, nil
		}
		if m := d.started(); m != nil && m.hasEnded() {
			return nil, fmt.Errorf("erofsd has ended: %w", cmp.Or(m.err, err))
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
	if m := d.started(); m != nil && d.held() > 0 {
		// Its socket is among what is held: who asks would wait for the next one.
		defer m.onEnd(cancel)()
	}
	v, err := d.erofsd.Version(ctx)
	if refusal := (*api.Error)(nil); errors.As(err, &refusal) && refusal.Status == http.StatusNotFound {
		return d.identifyNydusd(ctx)
	}
	if err != nil {
		return nil, err
	}
	p, err := openProcess(v.PID)
	if err != nil {
		return nil, err
	}
	again, err := d.erofsd.Version(ctx) // the number may have become another's before it was opened
	if err == nil && again.PID != v.PID {
		err = errors.New("it was replaced this moment")
	}
	if err != nil {
		p.close()
		return nil, err
	}
	d.setAnswerer(d.erofsd)
	return p, nil
}

// identifyNydusd opens the nydusd that answers at the socket.
func (d *daemon) identifyNydusd(ctx context.Context) (*process, error) {
	if d.nydusd == nil {
		return nil, fmt.Errorf(`what answers at %s is not erofsd: set daemon.mode = "connect" if it is a nydusd that is to serve the images; else stop it, or set daemon.socket`, d.c.Socket)
	}
	p, err := openListener(ctx, d.c.Socket)
	if err != nil {
		return nil, err
	}
	if err := d.nydusd.Begin(ctx, p.pid); err != nil {
		p.close()
		return nil, fmt.Errorf("what answers at %s is not erofsd, and no nydusd that can serve: %w", d.c.Socket, err)
	}
	d.setAnswerer(d.nydusd)
	return p, nil
}
