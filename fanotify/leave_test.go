package fanotify

import (
	"context"
	"testing"

	"github.com/erofsd/erofsd/fanotify/fanotifytest"
)

// Leave lets a fill end that can, and leaves the others and the queue to a successor.
func TestLeave(t *testing.T) {
	h := newKeeper(t)
	g, die := h.successor(Options{})
	hold := make(chan struct{})
	quick := watchNew(t, g, &object{fill: func(context.Context, int64, int64) error { <-hold; return nil }})
	slow := watchNew(t, g, waiting)
	served := make(chan error, 1)
	go func() { served <- g.Serve(context.Background()) }()
	ends, stays := h.k.Raise(quick, 0, 4096), h.k.Raise(slow, 0, 4096)
	eventually(t, "the fills begin", func() bool { return g.Stats().InFlight == 2 })
	g.Leave()
	close(hold)
	if got := ends.Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	die()
	if got, ok := stays.Answered(); ok {
		t.Errorf("answered %#x by the process that left", got)
	}
	next, _ := h.successor(Options{})
	if err := next.Expect(slow, filled); err != nil {
		t.Fatal(err)
	}
	serve(t, next)
	for _, r := range []*fanotifytest.Read{stays, h.k.Raise(slow, 4096, 4096)} {
		if got := r.Answer(t); got != fanotifytest.Allow {
			t.Errorf("answer %#x", got)
		}
	}
	eventually(t, "nothing is left", h.empty)
}
