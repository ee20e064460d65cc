package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/fdstore"
	"github.com/erofsd/erofsd/internal/nydusd"
	"github.com/erofsd/erofsd/snapshotter"
)

// A daemon is erofsd at a socket: one that runs, or that is started and started again. It
// outlives the snapshotter, and is found again by the next one. One that runs may be a nydusd.
type daemon struct {
	erofsd *api.Client
	nydusd *nydusd.Daemon // nil: erofsd alone is taken
	c      daemonConfig
	log    *slog.Logger
	event  func(name string) // is told that it is RUNNING, or has DIED

	store    *fdstore.Store // of what it holds, so that another one goes on with that; nil: none
	watchdog time.Duration  // without a sign of life, until it is killed; 0: never
	watching sync.WaitGroup

	mu       sync.Mutex // guards what follows
	answerer answerer   // who answered last; erofsd before anybody did

	up     chan struct{} // closed while the daemon answers
	why    error         // it does not; nil: it was not asked yet
	over   error         // there is none and none is going to be started
	seen   bool          // one has answered
	since  time.Time     // when the one that was started here last began to answer; zero: it has not
	starts int           // since then
	fresh  bool          // the one that was started last was given nothing, and has not answered
	main   *mainProcess  // the last one's first process, nil if it is not known
}

var _ snapshotter.Mounter = (*daemon)(nil)

func newDaemon(c daemonConfig, log *slog.Logger, event func(name string)) *daemon {
	watchdog, _ := time.ParseDuration(c.Watchdog) // it was checked
	erofsd := api.NewClient(c.Socket)
	return &daemon{erofsd: erofsd, answerer: erofsd, c: c, log: log, event: event, watchdog: watchdog, up: make(chan struct{})}
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
	heldTime     = time.Minute            // without an answer, until what the last one held is let go of,
	heldStarts   = 3                      // and so many starts with it have failed
	signTime     = time.Minute            // within which it gives signs of life that nobody asks for
)

// BindImage waits until there is a daemon, for it or Status is the first thing that is asked
// of it for an image.
func (d *daemon) BindImage(ctx context.Context, r api.BindRequest) error {
	if err := d.await(ctx); err != nil {
		return err
	}
	return d.is().BindImage(ctx, r)
}

// Status waits as BindImage does.
func (d *daemon) Status(ctx context.Context) (api.Status, error) {
	if err := d.await(ctx); err != nil {
		return api.Status{}, err
	}
	return d.is().Status(ctx)
}

// await returns when the daemon answers, or says why it does not.
func (d *daemon) await(ctx context.Context) error {
	d.mu.Lock()
	up, over := d.up, d.over
	d.mu.Unlock()
	if over != nil {
		return over
	}
	patient := time.NewTimer(patience)
	defer patient.Stop()
	select {
	case <-up:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-patient.C:
		title := d.title()
		d.mu.Lock()
		defer d.mu.Unlock()
		return fmt.Errorf("%s does not answer at %s: %w", title, d.c.Socket, cmp.Or(d.why, errors.New("it is being started")))
	}
}

// close drops connections and the store. What is stored stays with the service manager.
func (d *daemon) close() {
	err := d.erofsd.Close()
	if d.nydusd != nil {
		d.nydusd.Close()
	}
	if d.store != nil {
		err = errors.Join(err, d.store.Close())
	}
	if err != nil {
		d.log.Debug("close connections to the daemon", "err", err)
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
