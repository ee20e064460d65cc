package backend

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// RetryPolicy says how often and when to try again.
type RetryPolicy struct {
	// Attempts is how often a call is tried in all: a retry limit and one. 0: 6, which with the other
	// defaults bridges about three seconds.
	Attempts int
	// PrefetchAttempts is the same for calls that nobody waits for, see [WithPriority];
	// never more than Attempts. 0: 2.
	PrefetchAttempts int
	// Budget bounds the time in which further attempts begin. 0: 60 s.
	Budget time.Duration
	// Wait is the pause before the second attempt; it doubles with each further
	// one up to MaxWait and is shortened at random by up to a half. 0: 100 ms.
	Wait time.Duration
	// MaxWait bounds a pause; a server that asks with Retry-After for a longer
	// one gets no further attempt. 0: 10 s.
	MaxWait time.Duration
	// BreakAfter is how many reads of a blob in a row may fail after all their
	// attempts, or those that their deadlines leave time for, before reads of that
	// blob fail at once. 0: 3.
	BreakAfter int
	// BreakFor is how long they do so, until one attempt per read is made
	// again. The first that succeeds ends it. 0: 2 s.
	BreakFor time.Duration
}

func (p RetryPolicy) withDefaults() RetryPolicy {
	set(&p.Attempts, 6)
	set(&p.PrefetchAttempts, 2)
	set(&p.Budget, 60*time.Second)
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
// attempts or the budget are used up. It does not begin a pause that ctx's deadline
// would cut. f gets a context that knows which attempt it is.
func (p RetryPolicy) Do(ctx context.Context, f func(ctx context.Context) error) error {
	p = p.withDefaults()
	if PriorityOf(ctx) == Prefetch {
		p.Attempts = min(p.Attempts, p.PrefetchAttempts)
	}
	start, wait, around := time.Now(), p.Wait, new(atomic.Bool)
	for n := 1; ; n++ {
		err := f(withTry(ctx, try{last: n >= p.Attempts, around: around}))
		if err == nil || ctx.Err() != nil || !Temporary(err) {
			return err
		}
		pause := min(wait, p.MaxWait)
		pause -= rand.N(pause/2 + 1)
		if status, ok := errors.AsType[*StatusError](err); ok {
			pause = max(pause, status.RetryAfter)
		}
		if deadline, ok := ctx.Deadline(); n >= p.Attempts || pause > p.MaxWait || time.Since(start)+pause > p.Budget || ok && time.Until(deadline) <= pause {
			return fmt.Errorf("attempt %d: %w", n, err)
		}
		if sleep(ctx, pause) != nil {
			return fmt.Errorf("%w while waiting to try again after: %w", ctx.Err(), err)
		}
		wait = min(2*wait, p.MaxWait)
	}
}

// sleep waits for d, or returns the error of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Retry returns a store that tries again what failed for a reason that may pass:
// whole reads, because a range of a blob may be read as often as one likes. It
// gives a blob that stays broken a rest, see [RetryPolicy]. A host that asked for a rest
// with Retry-After gets it from all its blobs; a host that is merely down does not: one
// blob's trouble is not another's, and each read backs off by itself.
func Retry(s Store, p RetryPolicy) Store {
	return &retryStore{store: s, policy: p.withDefaults(), rests: make(map[string]rest)}
}

type retryStore struct {
	store  Store
	policy RetryPolicy

	// mu guards rests.
	mu    sync.Mutex
	rests map[string]rest // by host
}

// rest is the time until which a host wants to be left alone, as it said with err.
type rest struct {
	until time.Time
	err   error
}

// do calls f as policy says, leaving host alone while it wants that.
func (s *retryStore) do(ctx context.Context, policy RetryPolicy, host string, f func(ctx context.Context) error) error {
	return policy.Do(ctx, func(ctx context.Context) error {
		if wait, err := s.rest(host); wait > 0 {
			if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
				return fmt.Errorf("not tried, the server wants to be left alone for %v: %w", wait.Round(time.Millisecond), err)
			}
			// Not all at once when the rest is over.
			if err := sleep(ctx, wait+rand.N(policy.Wait)); err != nil {
				return fmt.Errorf("wait for the server, which wants to be left alone: %w", err)
			}
		}
		err := f(ctx)
		if status, ok := errors.AsType[*StatusError](err); ok && status.RetryAfter > 0 && status.RetryAfter <= policy.MaxWait {
			s.mu.Lock()
			s.rests[host] = rest{time.Now().Add(status.RetryAfter), err}
			s.mu.Unlock()
		}
		return err
	})
}

// rest returns how long host wants to be left alone, and its words.
func (s *retryStore) rest(host string) (time.Duration, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rests[host]
	wait := time.Until(r.until)
	if wait <= 0 {
		delete(s.rests, host)
	}
	return wait, r.err
}

func (s *retryStore) Open(ctx context.Context, ref Ref) (Blob, error) {
	var b Blob
	err := s.do(ctx, s.policy, ref.Host, func(ctx context.Context) (err error) {
		b, err = s.store.Open(ctx, ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &retryBlob{Blob: b, store: s, host: ref.Host, policy: s.policy}, nil
}

type retryBlob struct {
	Blob
	store  *retryStore
	host   string
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
	err = b.store.do(ctx, policy, b.host, func(ctx context.Context) error { return b.Blob.ReadAt(ctx, p, off) })
	// What nobody waits for is given up early: its failures say too little of the server to
	// refuse those who wait.
	if ctx.Err() == nil && (err == nil || PriorityOf(ctx) == OnDemand) {
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
