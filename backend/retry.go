package backend

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// RetryPolicy says how often and when to try again.
type RetryPolicy struct {
	// Attempts is how often a call is tried in all. 0: 6, which with the other
	// defaults bridges about three seconds.
	Attempts int
	// Wait is the pause before the second attempt; it doubles with each further
	// one up to MaxWait and is shortened at random by up to a half. 0: 100 ms.
	Wait time.Duration
	// MaxWait bounds a pause; a server that asks with Retry-After for a longer
	// one gets no further attempt. 0: 10 s.
	MaxWait time.Duration
	// BreakAfter is how many reads of a blob in a row may fail after all their
	// attempts before reads of that blob fail at once. 0: 3.
	BreakAfter int
	// BreakFor is how long they do so, until one attempt per read is made
	// again. The first that succeeds ends it. 0: 2 s.
	BreakFor time.Duration
}

func (p RetryPolicy) withDefaults() RetryPolicy {
	set(&p.Attempts, 6)
	set(&p.Wait, 100*time.Millisecond)
	set(&p.MaxWait, 10*time.Second)
	set(&p.BreakAfter, 3)
	set(&p.BreakFor, 2*time.Second)
	return p
}

// set replaces a value that was left out by its default.
func set[T int | int64 | time.Duration](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Do calls f until it succeeds, fails for good (see [Temporary]), ctx ends or the
// attempts are used up. It does not begin a pause that ctx's deadline would cut.
func (p RetryPolicy) Do(ctx context.Context, f func() error) error {
	p = p.withDefaults()
	wait := p.Wait
	for n := 1; ; n++ {
		err := f()
		if err == nil || ctx.Err() != nil || !Temporary(err) {
			return err
		}
		pause := min(wait, p.MaxWait)
		pause -= rand.N(pause/2 + 1)
		if status, ok := errors.AsType[*StatusError](err); ok {
			pause = max(pause, status.RetryAfter)
		}
		if deadline, ok := ctx.Deadline(); n >= p.Attempts || pause > p.MaxWait || ok && time.Until(deadline) <= pause {
			return fmt.Errorf("attempt %d: %w", n, err)
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w while waiting to try again after: %w", ctx.Err(), err)
		}
		wait = min(2*wait, p.MaxWait)
	}
}

// Retry returns a store that tries again what failed for a reason that may pass:
// whole reads, because a range of a blob may be read as often as one likes. It
// gives a server that stays broken a rest, see [RetryPolicy].
func Retry(s Store, p RetryPolicy) Store { return &retryStore{s, p.withDefaults()} }

type retryStore struct {
	store  Store
	policy RetryPolicy
}

func (s *retryStore) Open(ctx context.Context, ref Ref) (Blob, error) {
	var b Blob
	err := s.policy.Do(ctx, func() (err error) {
		b, err = s.store.Open(ctx, ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &retryBlob{Blob: b, policy: s.policy}, nil
}

type retryBlob struct {
	Blob
	policy RetryPolicy

	// mu guards the fields below: the circuit breaker.
	mu       sync.Mutex
	failures int       // reads in a row that failed after all attempts
	until    time.Time // reads fail at once before this
	last     error     // the last of these failures
}

func (b *retryBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	policy, err := b.admit()
	if err != nil {
		return err
	}
	err = policy.Do(ctx, func() error { return b.Blob.ReadAt(ctx, p, off) })
	if ctx.Err() == nil {
		b.record(err)
	}
	return err
}

// admit refuses a read while the breaker is open and returns the policy of the
// read otherwise: a blob that failed too often gets one attempt per read.
func (b *retryBlob) admit() (RetryPolicy, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.policy
	if b.failures < p.BreakAfter {
		return p, nil
	}
	if wait := time.Until(b.until); wait > 0 {
		return p, fmt.Errorf("not tried: the last %d reads of this blob failed, next attempt in %v: %w", b.failures, wait.Round(time.Millisecond), b.last)
	}
	p.Attempts = 1
	return p, nil
}

// record counts the outcome of a read. Permanent errors are answers of a server
// that works.
func (b *retryBlob) record(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil || !Temporary(err) {
		b.failures, b.last = 0, nil
		return
	}
	b.failures++
	b.last = err
	b.until = time.Now().Add(b.policy.BreakFor)
}
