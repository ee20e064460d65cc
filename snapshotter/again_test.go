package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
)

// TestWorkerDies: who wants a container hears nothing of a worker that ends below any request
// for it, and of one that comes back again and again only that.
func TestWorkerDies(t *testing.T) {
	for _, call := range []string{"bind", "status", "mount"} {
		t.Run(call, func(t *testing.T) {
			r := newLazy(t)
			top := pull(t.Context(), t, r, "1", bootstrapOf(t, "unnoticed"))
			await(t, "recovery of nothing", func() bool { return len(r.recover) == 0 })
			r.daemon.mu.Lock()
			r.daemon.dies = map[string]int{call: 2}
			r.daemon.mu.Unlock()
			if text, _ := readIn(t, []mount.Mount{prepare(t, r.Snapshotter, "c", top)}); text != "unnoticed" {
				t.Errorf("the container reads %q", text)
			}
		})
	}
}

// TestAgain: only a request whose worker has ended is repeated, and not for who has left.
func TestAgain(t *testing.T) {
	other := fmt.Errorf("refused: %w", errdefs.ErrFailedPrecondition)
	busy := classified(api.Conflict(io.ErrClosedPipe))
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx     context.Context
		answers []error
		want    error
		calls   int
	}{
		{t.Context(), []error{nil}, nil, 1},
		{t.Context(), []error{other, nil}, other, 1},
		{t.Context(), []error{io.EOF, io.ErrUnexpectedEOF, nil}, nil, 3},
		{t.Context(), []error{io.EOF, other}, other, 2},
		{t.Context(), []error{classified(api.Unavailable(io.ErrClosedPipe)), nil}, nil, 2},
		{t.Context(), []error{busy, nil}, busy, 1},
		{gone, []error{io.EOF, nil}, io.EOF, 1},
	} {
		calls := 0
		err := again(c.ctx, func() error { calls++; return c.answers[calls-1] })
		if !errors.Is(err, c.want) || calls != c.calls {
			t.Errorf("answers %v: %v after %d calls, want %v after %d", c.answers, err, calls, c.want, c.calls)
		}
	}
}
