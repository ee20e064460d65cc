package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/keeper"
)

// What the keeper holds for the next worker, by name.
const (
	heldLock     = "lock"     // on the root; its data is the root
	heldJournal  = "journal"  // of the fanotify group; the keeper hands it over first
	heldGroup    = "group"    // the fanotify group
	heldGuard    = "guard"    // our end of the guard's pipe
	heldGuardPID = "guardpid" // a pidfd of the guard
	heldDevice   = "device"   // /dev/cachefiles, bound
	heldListener = "listener" // of the API
	heldValues   = "values"   // what Control.SetConfig was told
	heldBlob     = "blob/"    // a cache file that was opened before its mark, by its name
	heldImage    = "image/"   // a savedImage, by its key
	heldBinding  = "binding/" // the same, of a bound image
)

// StateVersion is the version of what a worker leaves to its successor.
const StateVersion = "1"

// A Holder keeps with the keeper what must outlive this process, and has what a
// predecessor left there. Nil is one that keeps nothing. It is safe for concurrent use,
// but what was left is taken by one goroutine.
type Holder struct {
	client      *keeper.Client
	log         *slog.Logger
	left        map[string]keeper.Entry // by the predecessor, and not taken yet
	reservation *fanotify.Reservation   // nil: there was no journal
	worker      *os.File                // lock
	socket      string                  // of the API
	turn        turn                    // serialises what the keeper is told
	alone       chan struct{}           // closed when no keeper came in the place of one that died
}

// successorTime is how long after its keeper's death a worker expects to be ended by the next
// one. After it, it serves new images as well: a service manager that was started anew itself
// may have nothing that another keeper could go on with, and waits for this worker's end. A
// keeper that comes later still opens them again, by their records.
const successorTime = 5 * time.Second

// Connect returns the Holder of a worker; nil when this process was not started by a
// keeper. It comes before anything else is opened: the kernel knows the events that a
// predecessor left by descriptor numbers, which must not be used for others.
func Connect() (*Holder, error) {
	c, err := keeper.Connect()
	if err != nil || c == nil {
		return nil, err
	}
	c.StateVersion = StateVersion
	h := &Holder{client: c, log: slog.New(slog.DiscardHandler), left: map[string]keeper.Entry{}, turn: make(turn, 1), alone: make(chan struct{})}
	if journal := c.Journal(); journal != nil {
		if h.reservation, err = fanotify.Reserve(journal); err != nil {
			return nil, fmt.Errorf("take over from the keeper: %w", err)
		}
	}
	return h, nil
}

// Begin waits for the predecessor's end and gets what it left.
func (h *Holder) Begin(ctx context.Context, log *slog.Logger) error {
	h.log = log
	entries, err := h.client.Entries(ctx)
	if err == nil && h.reservation == nil && h.client.Journal() != nil {
		h.reservation, err = fanotify.Reserve(h.client.Journal())
	}
	if err != nil {
		return fmt.Errorf("take over from the keeper: %w", err)
	}
	for _, e := range entries {
		h.left[e.Name] = e
	}
	return nil
}

// inherits reports whether a predecessor left something called name.
func (h *Holder) inherits(name string) bool {
	if h == nil {
		return false
	}
	_, ok := h.left[name]
	return ok
}

// take returns what the predecessor left under name, once; the zero Entry if nothing. The
// keeper holds it on.
func (h *Holder) take(name string) keeper.Entry {
	if h == nil {
		return keeper.Entry{}
	}
	e := h.left[name]
	delete(h.left, name)
	return e
}

// takeAll returns what was left under names that begin with prefix, by the rest of those.
func (h *Holder) takeAll(prefix string) map[string]keeper.Entry {
	out := map[string]keeper.Entry{}
	if h == nil {
		return out
	}
	for name := range h.left {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			out[rest] = h.take(name)
		}
	}
	return out
}

// put has the keeper hold data and f, if not nil, which stays the caller's. Without a
// keeper there is nothing to do, nor after its death, unless a service manager is about to
// start it anew: its next worker would not know of what this one does now.
func (h *Holder) put(ctx context.Context, name string, data []byte, f *os.File) error {
	if h == nil {
		return nil
	}
	if err := h.turn.take(ctx); err != nil {
		return err
	}
	defer h.turn.give()
	err := h.client.Put(ctx, keeper.Entry{Name: name, Data: data, File: f})
	if err != nil && h.successor() {
		return api.Unavailable(fmt.Errorf("have the keeper hold %s: it died; its successor starts another daemon, try again then", name))
	}
	return h.done("hold "+name, err)
}

// putJSON is put of v.
func (h *Holder) putJSON(ctx context.Context, name string, v any) error {
	if h == nil {
		return nil
	}
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return h.put(ctx, name, data, nil)
}

// drop has the keeper let go of name, unless it is used again. Who uses it says so before
// it puts the name.
func (h *Holder) drop(name string, used func() bool) {
	if h == nil {
		return
	}
	h.turn <- struct{}{} // held for one answer of the keeper
	defer h.turn.give()
	if used() {
		return
	}
	if err := h.done("let go of "+name, h.client.Drop(context.Background(), name)); err != nil {
		h.log.Warn("the keeper holds more than it has to", "err", err)
	}
}

// belowSystemd reports whether systemd started the keeper (sd_booted(3)).
func (h *Holder) belowSystemd() bool {
	return h != nil && h.client.Returns() && exists("/run/systemd/system")
}

// successor reports whether the keeper is dead and another one comes.
func (h *Holder) successor() bool {
	select {
	case <-h.alone:
		return false
	default:
	}
	select {
	case <-h.client.Gone():
		return h.client.Returns()
	default:
		return false
	}
}

// done is what becomes of the keeper's answer.
func (h *Holder) done(what string, err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-h.client.Gone():
		return nil
	default:
		return fmt.Errorf("have the keeper %s: %w", what, err)
	}
}

// watch says so when the keeper dies before ctx is done, and what that means.
func (h *Holder) watch(ctx context.Context) {
	select {
	case <-h.client.Gone():
	case <-ctx.Done():
		return
	}
	if h.client.Returns() {
		h.log.Error("the keeper died; images are served on until the service manager has started it again")
		late := time.NewTimer(successorTime)
		defer late.Stop()
		select {
		case <-late.C:
		case <-ctx.Done():
			return
		}
	}
	close(h.alone)
	h.log.Error("no keeper is there any more; images are served, but if the daemon dies too, what is not in the cache reads as EIO. " +
		"Restart the service when it suits you")
}

// lockWorker makes this process the only worker of root: a predecessor whose keeper died
// may serve on, with the same lock on the root.
func (h *Holder) lockWorker(root string) (err error) {
	if h == nil {
		return nil
	}
	name := filepath.Join(root, "worker")
	h.worker, err = os.OpenFile(name, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("lock %s: %w", name, err)
	}
	if err := syscall.Flock(int(h.worker.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return errors.Join(fmt.Errorf("lock %s: a worker without its keeper still serves the images; end it with SIGTERM (fuser %s shows it), "+
			"and start again: %w", name, name, err), h.worker.Close())
	}
	return nil
}

// lockRoot is the lock of root, which a predecessor may have left.
func (h *Holder) lockRoot(ctx context.Context, root string) (*os.File, error) {
	if err := h.lockWorker(root); err != nil {
		return nil, err
	}
	if e := h.take(heldLock); e.File != nil {
		if string(e.Data) != root {
			return nil, errors.Join(fmt.Errorf("serve images from %s: the daemon before this one has the root %s; end that one first", root, e.Data), e.File.Close())
		}
		return e.File, nil
	}
	f, err := lockRoot(root)
	if err != nil {
		return nil, err
	}
	if err := h.put(ctx, heldLock, []byte(root), f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// journal gives o the journal of the fanotify group, the predecessor's if there was one.
// Without a keeper there is none: nobody could read it.
func (h *Holder) journal(ctx context.Context, o *fanotify.Options) error {
	if h == nil {
		return nil
	}
	o.Reservation = h.reservation
	if o.Journal = h.take(heldJournal).File; o.Journal != nil {
		return nil
	}
	f, err := fanotify.NewJournal()
	if err != nil {
		return err
	}
	if err := h.put(ctx, heldJournal, nil, f); err != nil {
		return errors.Join(err, f.Close())
	}
	o.Journal = f
	return nil
}

// ready tells the keeper that the daemon serves, and watches the keeper until ctx is done.
// Signs of life go on until over is: try comes before each, and the keeper kills a daemon
// in which it hangs.
func (h *Holder) ready(ctx, over context.Context, try func()) error {
	if h == nil {
		return nil
	}
	go h.watch(ctx)
	if h.client.AliveEvery() > 0 {
		if err := h.done("know that the daemon is alive", h.client.Alive(over)); err != nil {
			return err
		}
		go h.live(over, try)
	}
	return h.done("know that the daemon serves", h.client.Ready(context.WithoutCancel(ctx))) // an end comes after it
}

// end tells the keeper that nobody is needed any more, and closes what was left and
// nobody took.
func (h *Holder) end() error {
	if h == nil {
		return nil
	}
	var errs []error
	if h.socket != "" {
		err := os.Remove(h.socket)
		if errors.Is(err, fs.ErrPermission) { // we have become a user; who listens there next removes it
			err = nil
		}
		errs = append(errs, err)
	}
	for name := range h.left {
		if f := h.take(name).File; f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(append(errs, h.done("know of the end", h.client.End(context.Background())))...)
}
