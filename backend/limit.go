package backend

import (
	"context"
	"fmt"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// Limits bounds what a store does at the same time, for all its blobs together.
type Limits struct {
	// Requests is how many calls of Open and ReadAt may be in flight. 0: 16.
	Requests int
	// Bytes is how many bytes of reads may be in flight; a single read that is
	// larger counts as this many. 0: 32 MiB, twice what 10 Gbit/s at 10 ms hold.
	Bytes int64
	// Rate is how many bytes per second may be asked for. 0: no bound.
	Rate int64
}

// Limit returns a store that makes calls wait while they would exceed l, first
// come, first served. A wait ends with ctx.
func Limit(s Store, l Limits) Store {
	set(&l.Requests, 16)
	set(&l.Bytes, 32<<20)
	limited := &limitStore{
		store:    s,
		max:      l.Bytes,
		requests: semaphore.NewWeighted(int64(l.Requests)),
		bytes:    semaphore.NewWeighted(l.Bytes),
	}
	if l.Rate > 0 {
		// A tenth of a second at once keeps the rate even on short terms.
		burst := min(max(l.Rate/10, 64<<10), 1<<30)
		limited.rate = rate.NewLimiter(rate.Limit(l.Rate), int(burst))
	}
	return limited
}

type limitStore struct {
	store           Store
	max             int64
	requests, bytes *semaphore.Weighted
	rate            *rate.Limiter // nil: no bound
}

func (s *limitStore) Open(ctx context.Context, ref Ref) (Blob, error) {
	if err := s.requests.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("wait to open blob %s: %w", ref.Digest, err)
	}
	defer s.requests.Release(1)
	b, err := s.store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	return &limitBlob{b, s}, nil
}

// pace waits until n more bytes may be asked for.
func (s *limitStore) pace(ctx context.Context, n int) error {
	for s.rate != nil && n > 0 {
		part := min(n, s.rate.Burst())
		if err := s.rate.WaitN(ctx, part); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("bandwidth limit of %.0f bytes/s: %w", s.rate.Limit(), context.DeadlineExceeded)
		}
		n -= part
	}
	return nil
}

type limitBlob struct {
	Blob
	store *limitStore
}

func (b *limitBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	s, weight := b.store, min(int64(len(p)), b.store.max)
	if err := s.bytes.Acquire(ctx, weight); err != nil {
		return fmt.Errorf("wait to read %d bytes at %d: %w", len(p), off, err)
	}
	defer s.bytes.Release(weight)
	if err := s.pace(ctx, len(p)); err != nil {
		return fmt.Errorf("wait to read %d bytes at %d: %w", len(p), off, err)
	}
	if err := s.requests.Acquire(ctx, 1); err != nil {
		return fmt.Errorf("wait to read %d bytes at %d: %w", len(p), off, err)
	}
	defer s.requests.Release(1)
	return b.Blob.ReadAt(ctx, p, off)
}
