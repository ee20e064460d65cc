package blobmgr

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
)

func wishing(x *fixture, s *store, p Prefetch) Source {
	src := x.source(s)
	src.Prefetch = p
	return src
}

func TestPrefetchAllNeedsNoReader(t *testing.T) {
	x := makeBlob(t, 60, evenly(128, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		o := quietOptions() // also where completion is off
		m := newManager(t, o)
		defer m.Close()
		b := open(t, m, wishing(x, s, Prefetch{Mode: All}))
		defer closeBlob(t, b)
		<-b.Done()
		check(t, b, x, 0, b.Size())
		if st := b.Stats(); st.Unasked != st.Fetched || st.Fetched > x.entry.DataEnd() {
			t.Errorf("%+v", st)
		}
	})
}

func TestPrefetchNothing(t *testing.T) {
	x := makeBlob(t, 61, evenly(64, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		m := newManager(t, Options{Readahead: -1})
		defer m.Close()
		b := open(t, m, wishing(x, s, Prefetch{Mode: Nothing}))
		defer closeBlob(t, b)
		fill(t, b, x, 0, 4096)
		time.Sleep(time.Hour)
		if st := b.Stats(); st.Requests != 1 {
			t.Errorf("%+v", st)
		}
		// Another image of the blob asks for more, and that counts.
		if again := open(t, m, wishing(x, s, Prefetch{Mode: All})); again != b {
			t.Error("the blob is not shared")
		}
		defer closeBlob(t, b)
		<-b.Done()
	})
}

func TestPrefetchPace(t *testing.T) {
	x := makeBlob(t, 62, evenly(128, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := &store{stored: x.stored}
		m := newManager(t, Options{Readahead: -1})
		defer m.Close()
		const perSecond = 1 << 20
		start := time.Now()
		b := open(t, m, wishing(x, s, Prefetch{Mode: All, Workers: 2, Pace: rate.NewLimiter(perSecond, 1<<20)}))
		defer closeBlob(t, b)
		<-b.Done()
		// The burst, and what two workers may be ahead, come for nothing.
		least := time.Duration(x.entry.DataEnd()-4<<20) * time.Second / perSecond
		if took := time.Since(start); took < least {
			t.Errorf("%d bytes took %v, want %v at least", x.entry.DataEnd(), took, least)
		}
	})
}

func TestFetchInOrder(t *testing.T) {
	x := makeBlob(t, 63, evenly(64, 64<<10))
	s := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	s.requests()
	runs := []File{{First: 40, Last: 42}, {First: -1, Last: 3}, {First: 3, Last: 5}, {First: 9, Last: 900}, {First: 40, Last: 41}}
	if err := b.Fetch(t.Context(), runs); err != nil {
		t.Fatal(err)
	}
	log, _ := s.requests()
	if len(log) != 2 {
		t.Fatalf("requests %+v, want one for each run that is in the blob", log)
	}
	for _, c := range []int{40, 41, 3, 4} {
		u := b.table.UnitOf(c)
		if !b.present.has(u) {
			t.Errorf("chunk %d is absent", c)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.setFault(func(ctx context.Context, _ []byte, _ int64) error { <-ctx.Done(); return ctx.Err() })
	if err := b.Fetch(ctx, []File{{First: 10, Last: 12}}); err == nil {
		t.Error("a fetch outlived its context")
	}
}

func TestFetchWaitsForTheFile(t *testing.T) {
	x := makeBlob(t, 64, evenly(8, 64<<10))
	m := attachedManager(t, "")
	b := open(t, m, wishing(x, &store{stored: x.stored}, Prefetch{Mode: All}))
	fetched := make(chan error, 1)
	go func() { fetched <- b.Fetch(t.Context(), []File{{First: 2, Last: 4}}) }()
	o := newObjectFile(t)
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if err := <-fetched; err != nil {
		t.Error(err)
	}
	waitDone(t, b) // everything, from the moment that the file was there
	o.check(x, 0, b.Size())
	b.Detach(o)
	go func() { fetched <- b.Fetch(t.Context(), []File{{First: 0, Last: 1}}) }()
	closeBlob(t, b)
	if err := <-fetched; err == nil {
		t.Error("a fetch outlived its blob")
	}
}

// What a reader fetched while a background request waited for memory is not fetched
// again by that.
func TestNothingTwice(t *testing.T) {
	x := makeBlob(t, 65, evenly(10, 4096))
	s := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	if err := m.memory.background.Acquire(t.Context(), m.memory.backgroundSize); err != nil {
		t.Fatal(err)
	}
	fetched := make(chan error, 1)
	go func() { fetched <- b.Fetch(t.Context(), []File{{First: 0, Last: 10}}) }()
	for m.memory.background.TryAcquire(0) { // until it waits
		time.Sleep(time.Millisecond)
	}
	fill(t, b, x, 5*4096, 4096) // from the reserve
	m.memory.background.Release(m.memory.backgroundSize)
	if err := <-fetched; err != nil {
		t.Fatal(err)
	}
	check(t, b, x, 0, b.Size())
	if n, most := b.Stats().Fetched, x.entry.DataEnd(); n > most {
		t.Errorf("%d bytes of a blob of %d were fetched", n, most)
	}
}
