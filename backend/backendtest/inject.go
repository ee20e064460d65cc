package backendtest

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"github.com/erofsd/erofsd/backend"
)

// An Op is a call of a store or blob that can be made to fail.
type Op string

// The operations.
const (
	OpOpen Op = "open"
	OpRead Op = "read"
)

// An Injector decides before each call whether it fails: with the error that it
// returns. It may wait, until ctx ends at the latest.
type Injector func(ctx context.Context, op Op) error

// Inject returns s with faults.
func Inject(s backend.Store, fault Injector) backend.Store { return &faultyStore{s, fault} }

type faultyStore struct {
	store backend.Store
	fault Injector
}

func (s *faultyStore) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	if err := s.fault(ctx, OpOpen); err != nil {
		return nil, err
	}
	b, err := s.store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	return &faultyBlob{b, s.fault}, nil
}

type faultyBlob struct {
	backend.Blob
	fault Injector
}

func (b *faultyBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := b.fault(ctx, OpRead); err != nil {
		return err
	}
	return b.Blob.ReadAt(ctx, p, off)
}

// OnIndex fails the read with number n, the first being 0.
func OnIndex(n int64, err error) Injector {
	var reads atomic.Int64
	return func(_ context.Context, op Op) error {
		if op == OpRead && reads.Add(1)-1 == n {
			return err
		}
		return nil
	}
}

// Randomly fails a share p of the reads, the same ones for the same seed as long
// as they are made one after the other.
func Randomly(p float64, seed uint64, err error) Injector {
	var mu sync.Mutex // guards r
	r := rand.New(rand.NewPCG(seed, 0))
	return func(_ context.Context, op Op) error {
		mu.Lock()
		defer mu.Unlock()
		if op == OpRead && r.Float64() < p {
			return err
		}
		return nil
	}
}

// A Toggle fails every call while it is set.
type Toggle struct{ err atomic.Pointer[error] }

// Set makes calls fail with err; nil ends that.
func (t *Toggle) Set(err error) { t.err.Store(&err) }

// Fault is the Injector.
func (t *Toggle) Fault(context.Context, Op) error {
	if err := t.err.Load(); err != nil {
		return *err
	}
	return nil
}

// A Counter counts calls and fails none.
type Counter struct{ Opens, Reads atomic.Int64 }

// Fault is the Injector.
func (c *Counter) Fault(_ context.Context, op Op) error {
	if op == OpOpen {
		c.Opens.Add(1)
	} else {
		c.Reads.Add(1)
	}
	return nil
}
