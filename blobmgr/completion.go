package blobmgr

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// completionRequests is how many requests of completions run at once, over all
	// blobs: four of 1 MiB use 99 % of a link (performance.md 2.3).
	completionRequests = 4
	// A failed completion tries again after a time between these.
	minBackoff = time.Second
	maxBackoff = time.Minute
)

// quiet knows when nobody misses anything.
type quiet struct {
	mu      sync.Mutex // guards what follows
	flights int        // of demand
	last    time.Time  // when one of them ended
}

func (q *quiet) enter() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.flights++
}

func (q *quiet) leave() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.flights--
	q.last = time.Now()
}

// missing returns how long it must stay quiet until it was quiet for d.
func (q *quiet) missing(d time.Duration) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.flights > 0 {
		return d
	}
	return d - time.Since(q.last)
}

// everything says that a reader wants all of b, and is at unit at: what is missing
// is fetched from there on, at full speed.
func (b *Blob) everything(at int) {
	b.mu.Lock()
	completes := b.completes()
	b.mu.Unlock()
	if !completes || b.hurry.Swap(true) {
		return
	}
	b.cursor.Store(int64(at))
	b.nudge()
}

// nudge makes whoever waits for a change of b look again.
func (b *Blob) nudge() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nudgeLocked()
}

// nudgeLocked is nudge for callers that hold mu.
func (b *Blob) nudgeLocked() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// finish brings b to completion, again whenever it gets further chunks, until ctx
// ends.
func (b *Blob) finish(ctx context.Context) {
	backoff := minBackoff
	for ctx.Err() == nil {
		b.mu.Lock()
		missing, complete, changed, completes := b.missing, b.complete, b.changed, b.completes()
		b.mu.Unlock()
		switch {
		case complete, missing > 0 && !completes:
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		case missing > 0:
			b.completeAll(ctx)
			continue
		}
		if err := b.settle(ctx); err != nil && ctx.Err() == nil {
			b.m.log.Warn("blob is complete but not durable, trying again", "blob", b.name, "err", err)
			b.pause(ctx, &backoff)
		}
	}
}

// settle makes a blob durable of which nothing is missing, and says so.
func (b *Blob) settle(ctx context.Context) error {
	if err := b.durable.take(ctx); err != nil {
		return err
	}
	defer b.durable.give() // extend waits, so nothing can become missing
	if err := b.writeMark(); err != nil {
		return err
	}
	b.mu.Lock()
	complete := b.missing == 0
	if complete && !b.complete {
		b.complete = true
		close(b.done)
	}
	b.mu.Unlock()
	if complete {
		b.endSibling(true)
	}
	return nil
}

// completeAll fetches until nothing is missing.
func (b *Blob) completeAll(ctx context.Context) {
	var workers sync.WaitGroup
	b.mu.Lock()
	n := b.prefetch.workers()
	b.mu.Unlock()
	for i := range n {
		workers.Go(func() { b.completeSome(ctx, i) })
	}
	workers.Wait()
}

// completeSome is one of the workers of completeAll. Worker i joins in when it has
// been quiet for longer than its predecessor needs, so that a program that goes on
// after a pause finds the link almost free.
func (b *Blob) completeSome(ctx context.Context, i int) {
	backoff, delay := minBackoff, b.m.opt.CompletionDelay
	for b.waitQuiet(ctx, delay+time.Duration(i)*b.m.opt.CompletionDelay/4) {
		n, ok := b.completeOne(ctx)
		err := b.pace(ctx, n) // after the fact: only now it shows how much it was
		switch {
		case err != nil || ctx.Err() != nil:
			return
		case !ok: // it failed, or others are at work on all that is missing
			b.pause(ctx, &backoff)
		default:
			backoff, delay = minBackoff, b.m.opt.CompletionDelay/4
		}
	}
}

// missingNow reports whether a needed unit is absent and to be fetched unasked, and
// returns a channel that is closed when that may have changed.
func (b *Blob) missingNow() (missing bool, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.missing > 0 && b.completes(), b.changed
}

// waitQuiet waits until nobody missed anything for d, or somebody wants everything.
// It returns false when there is nothing to do any more.
func (b *Blob) waitQuiet(ctx context.Context, d time.Duration) bool {
	for {
		missing, changed := b.missingNow()
		more := b.m.quiet.missing(d)
		switch {
		case ctx.Err() != nil || !missing:
			return false
		case more <= 0 || b.hurry.Load():
			return true
		}
		t := time.NewTimer(more)
		select {
		case <-t.C:
		case <-changed:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// completeOne has one request made, of n stored bytes, and reports whether that brought
// b forward.
func (b *Blob) completeOne(ctx context.Context) (n int64, ok bool) {
	select {
	case b.m.completions <- struct{}{}:
		defer func() { <-b.m.completions }()
	case <-ctx.Done():
		return 0, false
	}
	at, end := int(b.cursor.Load()), b.table.Units()
	f, next := b.dispatch(ctx, at, end, completion)
	if f == nil {
		f, next = b.dispatch(ctx, 0, end, completion)
	}
	b.cursor.Store(int64(next))
	if f == nil {
		return 0, false
	}
	n = b.ahead.bytes(f.units[0], f.units[len(f.units)-1]+1)
	select {
	case <-f.done:
	case <-ctx.Done():
		return 0, false
	}
	if len(f.errs) == 0 {
		b.troubled.Store(false)
		return n, true
	}
	if !b.troubled.Swap(true) {
		for _, err := range f.errs {
			b.m.log.Warn("fetching the rest of the blob goes on later", "blob", b.name, "err", err)
			break
		}
	}
	return n, false
}

// pause waits for about d, or less when b changes, and doubles d.
func (b *Blob) pause(ctx context.Context, d *time.Duration) {
	_, changed := b.missingNow()
	t := time.NewTimer(*d/2 + rand.N(*d))
	defer t.Stop()
	select {
	case <-t.C:
	case <-changed:
	case <-ctx.Done():
	}
	*d = min(2**d, maxBackoff)
}
