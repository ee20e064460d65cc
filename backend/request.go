package backend

import (
	"context"
	"sync/atomic"
)

// A Priority says who waits for a read.
type Priority int

// The priorities. The zero value is that of a read that a process waits for.
const (
	OnDemand Priority = iota
	Prefetch          // nobody waits yet
)

type priorityKey struct{}

// WithPriority returns a context whose reads have priority p: a forward proxy is told,
// and [Retry] gives up earlier on reads that nobody waits for.
func WithPriority(ctx context.Context, p Priority) context.Context {
	return context.WithValue(ctx, priorityKey{}, p)
}

// PriorityOf returns what WithPriority put into ctx, OnDemand when it did not.
func PriorityOf(ctx context.Context) Priority {
	p, _ := ctx.Value(priorityKey{}).(Priority)
	return p
}

type originKey struct{}

// FromOrigin returns a context whose reads skip mirrors, because what they sent was
// wrong, and a forward proxy that may be gone around.
func FromOrigin(ctx context.Context) context.Context {
	return context.WithValue(ctx, originKey{}, true)
}

func fromOrigin(ctx context.Context) bool { return ctx.Value(originKey{}) != nil }

type privateKey struct{}

// Private returns a context whose requests carry a password and therefore go past a
// forward proxy, if there is a way.
func Private(ctx context.Context) context.Context {
	return context.WithValue(ctx, privateKey{}, true)
}

func private(ctx context.Context) bool { return ctx.Value(privateKey{}) != nil }

type tryKey struct{}

// A try is one attempt of a read as [RetryPolicy] makes it and a forward proxy sees it.
type try struct {
	last   bool         // there will be no other
	around *atomic.Bool // set when the proxy failed this read: next time go around it
}

func withTry(ctx context.Context, t try) context.Context {
	return context.WithValue(ctx, tryKey{}, t)
}

// tryOf returns the attempt that ctx belongs to. Without a policy each read is its own
// only attempt.
func tryOf(ctx context.Context) try {
	if t, ok := ctx.Value(tryKey{}).(try); ok {
		return t
	}
	return try{last: true, around: new(atomic.Bool)}
}
