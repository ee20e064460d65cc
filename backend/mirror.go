package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// A MirrorStore is a store that may have the blobs of another, and its manners.
type MirrorStore struct {
	Store Store
	// Name is for logs.
	Name string
	// Ping asks whether the mirror is well. Nil: one read per CheckInterval is tried
	// at a mirror that is not.
	Ping func(ctx context.Context) error
	// CheckInterval is the time between two pings. 0: 5 s.
	CheckInterval time.Duration
	// CheckPause is how long after the last read pings go on. 0: 300 s.
	CheckPause time.Duration
	// FailureLimit is how many reads in a row may fail until the mirror is left alone.
	// 0: 5.
	FailureLimit int
}

// Mirror returns a store that asks the mirrors, in their order, before primary. What a
// mirror does not give, for any reason, the next source is asked for at once: a mirror
// that lacks a blob, or its login, does not hide the origin. Mirrors that fail are left
// alone until they are well; if all other sources fail they are asked even so. The wait
// of a read is at most the sum of those of the sources. Nothing is verified: a caller that
// got wrong bytes reads again with [FromOrigin]. Put [Retry] around it.
func Mirror(primary Store, log *slog.Logger, mirrors ...MirrorStore) *Mirrored {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m := &Mirrored{}
	for _, s := range mirrors {
		changed := func(well bool, why error) {
			if well {
				log.Info("mirror recovered", "mirror", s.Name)
			} else {
				log.Warn("mirror is unhealthy, reading elsewhere", "mirror", s.Name, "err", why)
			}
		}
		m.sources = append(m.sources, source{s.Store, s.Name, newHealth(s.Ping, s.CheckInterval, s.CheckPause, s.FailureLimit, changed)})
	}
	m.sources = append(m.sources, source{primary, "origin", nil})
	return m
}

// Mirrored is a [Store] with mirrors. Make one with [Mirror].
type Mirrored struct{ sources []source }

type source struct {
	store  Store
	name   string
	health *health // nil: the origin, which is always asked
}

// Close ends the pings. The store stays usable.
func (m *Mirrored) Close() error {
	for _, s := range m.sources {
		if s.health != nil {
			s.health.close()
		}
	}
	return nil
}

// Open opens a blob. Without ref.Size it asks the sources for it.
func (m *Mirrored) Open(ctx context.Context, ref Ref) (Blob, error) {
	b := &mirroredBlob{m: m, ref: ref, size: ref.Size, places: make([]place, len(m.sources))}
	if ref.Size == 0 {
		err := b.first(ctx, func(ctx context.Context, i int) error {
			open, err := b.open(ctx, i)
			if err == nil {
				b.size = open.Size()
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		b.ref.Size = b.size
		return b, nil
	}
	// The origin knows best whether ref makes sense; mirrors are opened when they are read.
	if _, err := b.open(ctx, len(m.sources)-1); err != nil && !b.elsewhere(ctx, err) {
		b.Close()
		return nil, err
	}
	return b, nil
}

// lacks is for how long a mirror is not asked again for a blob that it refused.
const lacks = time.Minute

type mirroredBlob struct {
	m      *Mirrored
	ref    Ref
	size   int64
	places []place // one per source
	closed atomic.Bool
}

// place is a blob at one source.
type place struct {
	blob  atomic.Pointer[Blob]      // nil: not open
	until atomic.Pointer[time.Time] // not asked before; nil: at any time
}

func (b *mirroredBlob) Size() int64 { return b.size }

func (b *mirroredBlob) Close() error {
	b.closed.Store(true)
	var errs []error
	for i := range b.places {
		if open := b.places[i].blob.Swap(nil); open != nil {
			errs = append(errs, (*open).Close())
		}
	}
	return errors.Join(errs...)
}

func (b *mirroredBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	switch {
	case b.closed.Load():
		return fmt.Errorf("read blob %s: %w", b.ref.Digest, os.ErrClosed)
	case ctx.Err() != nil:
		return fmt.Errorf("read blob %s: %w", b.ref.Digest, ctx.Err())
	}
	if err := CheckRange(off, int64(len(p)), b.size); err != nil || len(p) == 0 {
		return err
	}
	return b.first(ctx, func(ctx context.Context, i int) error {
		open, err := b.open(ctx, i)
		if err != nil {
			return err
		}
		return open.ReadAt(ctx, p, off)
	})
}

// elsewhere reports whether another source may do better than the one that gave err.
func (b *mirroredBlob) elsewhere(ctx context.Context, err error) bool {
	return len(b.places) > 1 && ctx.Err() == nil && !fromOrigin(ctx)
}

// open returns the blob at source i, opened once.
func (b *mirroredBlob) open(ctx context.Context, i int) (Blob, error) {
	place := &b.places[i]
	if open := place.blob.Load(); open != nil {
		return *open, nil
	}
	opened, err := b.m.sources[i].store.Open(ctx, b.ref)
	if err != nil {
		return nil, err
	}
	for !place.blob.CompareAndSwap(nil, &opened) {
		if other := place.blob.Load(); other != nil {
			opened.Close()
			return *other, nil
		}
	}
	if b.closed.Load() { // meanwhile; Close may have looked before
		if open := place.blob.Swap(nil); open != nil {
			(*open).Close()
		}
		return nil, os.ErrClosed
	}
	return opened, nil
}

// first calls f with the sources that are worth it, in order, until one succeeds, then
// with the others. The error is that of all, the origin's first.
func (b *mirroredBlob) first(ctx context.Context, f func(ctx context.Context, i int) error) error {
	errs := &sourcesError{}
	var later []int
	for i, s := range b.m.sources {
		if s.health != nil && (fromOrigin(ctx) || !b.worth(i)) {
			later = append(later, i)
			continue
		}
		if err := b.ask(ctx, i, f); err == nil || ctx.Err() != nil {
			return err
		} else {
			errs.add(s, err)
		}
	}
	if fromOrigin(ctx) {
		later = nil
	}
	for _, i := range later {
		if err := b.ask(ctx, i, f); err == nil || ctx.Err() != nil {
			return err
		} else {
			errs.add(b.m.sources[i], err)
		}
	}
	return errs.simple()
}

// worth reports whether mirror i is to be asked before the others have failed.
func (b *mirroredBlob) worth(i int) bool {
	until := b.places[i].until.Load()
	return (until == nil || time.Now().After(*until)) && b.m.sources[i].health.use()
}

// ask calls f with source i and remembers how it went.
func (b *mirroredBlob) ask(ctx context.Context, i int, f func(ctx context.Context, i int) error) error {
	err := f(ctx, i)
	h := b.m.sources[i].health
	switch {
	case h == nil || err != nil && ctx.Err() != nil:
	case err == nil:
		h.well()
		b.places[i].until.Store(nil)
	case Temporary(err):
		h.failed(err)
	default:
		// The mirror works, but not for this blob.
		until := time.Now().Add(lacks)
		b.places[i].until.Store(&until)
	}
	return err
}

// sourcesError is what went wrong at each source, the origin's first.
type sourcesError struct{ errs []error }

func (e *sourcesError) add(s source, err error) {
	if s.health == nil {
		e.errs = append([]error{err}, e.errs...)
		return
	}
	e.errs = append(e.errs, fmt.Errorf("mirror %s: %w", s.name, err))
}

// simple returns a single error as it is.
func (e *sourcesError) simple() error {
	if len(e.errs) == 1 {
		return e.errs[0]
	}
	return e
}

func (e *sourcesError) Error() string {
	text := e.errs[0].Error()
	for _, err := range e.errs[1:] {
		text += "; " + err.Error()
	}
	return text
}

func (e *sourcesError) Unwrap() []error { return e.errs }

// temporary: the source that has the blob may be the one that comes back.
func (e *sourcesError) temporary() bool {
	for _, err := range e.errs {
		if Temporary(err) {
			return true
		}
	}
	return false
}
