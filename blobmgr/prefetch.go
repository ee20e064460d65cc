package blobmgr

import (
	"context"
	"os"
	"time"

	"golang.org/x/time/rate"
)

// A Mode says what of a blob is fetched though nobody reads it, beside readahead. Of
// images that share a blob the one that asks for most decides.
type Mode int

// The modes; a larger one is more.
const (
	Nothing Mode = iota - 1
	Rest         // what is missing once nobody has missed anything for a while
	All          // everything, from the moment that the blob is open
)

// A Prefetch is how an image wants its blobs fetched unasked. The zero value is the
// usual completion.
type Prefetch struct {
	Mode Mode
	// Workers is how many requests of it a blob may have at a time. 0, and at most: 4,
	// which all blobs share.
	Workers int
	// Window is the first readahead window of a stream of reads, in stored bytes. 0: as
	// Options.Readahead says. Of several images the largest counts.
	Window int64
	// Pace, with a burst of at least 64 KiB, bounds the stored bytes that these requests
	// get; those of an image share one. Nil: no bound.
	Pace *rate.Limiter
}

// unasked counts what completion and prefetch have brought.
type unasked struct {
	bytes, requests int64
	since, until    time.Time // of the first and last request
}

// account counts a request of n stored bytes.
func (b *Blob) account(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unasked.bytes += n
	b.unasked.requests++
	b.unasked.until = time.Now()
	if b.unasked.since.IsZero() {
		b.unasked.since = b.unasked.until
	}
}

// more reports whether p asks for more than q.
func (p Prefetch) more(q Prefetch) bool {
	return p.Mode > q.Mode || p.Mode == q.Mode && q.Pace != nil && p.Pace == nil
}

// wish makes p count if it asks for more than what counts now.
func (b *Blob) wish(p Prefetch) {
	b.ahead.widen(p.Window)
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.more(b.prefetch) {
		b.prefetch = p
		b.nudgeLocked()
	}
	b.beginAll()
}

// beginAll starts to fetch everything, if that is wished. The caller holds mu.
func (b *Blob) beginAll() {
	if b.prefetch.Mode == All && !b.closed {
		b.hurry.Store(true)
		b.begin()
	}
}

// completes reports whether the rest of b is to be fetched. The caller holds mu.
func (b *Blob) completes() bool {
	if b.rests { // or what was evicted would come back at once
		return false
	}
	switch b.prefetch.Mode {
	case All:
		return true
	case Nothing:
		return false
	}
	return !b.m.opt.NoCompletion
}

// workers is how many requests of completion b may have.
func (p Prefetch) workers() int {
	if p.Workers <= 0 {
		return completionRequests
	}
	return min(p.Workers, completionRequests)
}

// pace waits until n more stored bytes may be asked for.
func (b *Blob) pace(ctx context.Context, n int64) error {
	b.mu.Lock()
	limit := b.prefetch.Pace
	b.mu.Unlock()
	for limit != nil && n > 0 {
		part := min(n, int64(limit.Burst()))
		if err := limit.WaitN(ctx, int(part)); err != nil {
			return err
		}
		n -= part
	}
	return nil
}

// Fetch fetches what is absent of runs, in their order and behind what readers wait for,
// once b can be filled. It returns when all of it was tried, or ctx or b ends; a failure
// of the backend is no error, because whoever needs the bytes asks again.
func (b *Blob) Fetch(ctx context.Context, runs []File) error {
	var flying []*flight
	land := func(leave int) error {
		for ; len(flying) > leave; flying = flying[1:] {
			select {
			case <-flying[0].done:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}
	for _, r := range runs {
		if r.First < 0 || r.First >= r.Last || r.Last > b.table.Len() {
			continue
		}
		last := b.table.UnitOf(r.Last-1) + 1
		for next := b.table.UnitOf(r.First); next < last; {
			if err := b.opened(ctx); err != nil {
				return err
			}
			f, then := b.dispatch(ctx, next, last, completion)
			if f == nil {
				next = then
				continue
			}
			flying = append(flying, f)
			if err := land(completionRequests - 1); err != nil {
				return err
			}
			if err := b.pace(ctx, b.ahead.bytes(next, then)); err != nil {
				return err
			}
			next = then
		}
	}
	return land(0)
}

// opened waits until b can be filled.
func (b *Blob) opened(ctx context.Context) error {
	for {
		b.mu.Lock()
		closed, gone, changed := b.closed, b.gone, b.changed
		b.mu.Unlock()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case gone:
			return os.ErrClosed
		case !closed:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
