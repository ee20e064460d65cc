package snapshotter

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"sync"
	"time"
)

// garbage is what is to be removed in the background.
type garbage struct {
	there chan struct{} // there may be some; capacity 1

	mu    sync.Mutex // guards what follows
	ids   []string   // directories of snapshots whose entries are gone for good
	other bool       // there may be garbage that nobody has named
}

func newGarbage() *garbage { return &garbage{there: make(chan struct{}, 1)} }

// add has the directory of a snapshot removed whose entry is gone. Its number does not come
// again: so nobody has to be kept from making snapshots while that is done.
func (g *garbage) add(id string) {
	g.mu.Lock()
	g.ids = append(g.ids, id)
	g.mu.Unlock()
	g.wake()
}

// look has it looked for everywhere.
func (g *garbage) look() {
	g.mu.Lock()
	g.other = true
	g.mu.Unlock()
	g.wake()
}

func (g *garbage) wake() {
	select {
	case g.there <- struct{}{}:
	default: // it is about to be removed
	}
}

// take returns what there is, and whether it has to be looked for as well.
func (g *garbage) take() (ids []string, look bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	ids, look = g.ids, g.other
	g.ids, g.other = nil, false
	return ids, look
}

// Pauses before garbage that could not be removed is tried again.
const (
	sweepPause    = time.Second
	sweepMaxPause = time.Minute
)

// sweepOn removes garbage until the end. What could not be removed waits for the next time
// that everything is looked at: what is removed meanwhile does not wait for it.
func (s *Snapshotter) sweepOn() {
	var again <-chan time.Time
	said := ""
	for pause := sweepPause; ; {
		all := false
		select {
		case <-s.ctx.Done():
			return
		case <-s.garbage.there:
		case <-again:
			again, all = nil, true
		}
		err := s.sweep(s.ctx, all)
		switch {
		case s.ctx.Err() != nil:
			return
		case err == nil && again == nil:
			pause, said = sweepPause, ""
		case err != nil:
			if err.Error() != said { // an image may be in use for days
				s.log.Warn("remove what is left of snapshots; it is tried again", "err", err)
			}
			said = err.Error()
			if again == nil {
				again, pause = time.After(pause), min(2*pause, sweepMaxPause)
			}
		}
	}
}

// sweep removes the garbage that is known, and all that can be found if that is wanted.
func (s *Snapshotter) sweep(ctx context.Context, all bool) error {
	if err := s.sweeping.take(ctx); err != nil {
		return err
	}
	defer s.sweeping.give()
	ids, look := s.garbage.take()
	var errs []error
	for _, id := range ids {
		errs = append(errs, s.sweepOne(ctx, id))
	}
	if all || look {
		lazy, err := s.discard(ctx, false)
		errs = append(errs, err)
		for _, id := range lazy {
			_, err := s.detach(ctx, id)
			errs = append(errs, err)
		}
		errs = append(errs, s.emptyTrash(ctx))
	}
	return errors.Join(errs...)
}

// sweepOne removes the directory of a snapshot whose entry is gone.
func (s *Snapshotter) sweepOne(ctx context.Context, id string) error {
	remove := s.detach
	if _, err := os.Lstat(s.point(id)); errors.Is(err, fs.ErrNotExist) {
		remove = func(context.Context, string) (string, error) { return s.discardOne(id) }
	}
	place, err := remove(ctx, id)
	if err != nil {
		if _, gone := os.Lstat(s.path(snapshotsDir, id)); errors.Is(gone, fs.ErrNotExist) {
			err = nil // somebody who looked for garbage was faster
		}
		return err
	}
	return s.destroy(ctx, place)
}
