package blobmgr

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The link of the figures in the documentation: 100 Mbit/s and 20 ms.
func slowLink(x *fixture) *store {
	return &store{stored: x.stored, rtt: 20 * time.Millisecond, rate: 12.5e6}
}

// evenly returns n chunk lengths of the same size.
func evenly(n, size int) []int {
	lens := make([]int, n)
	for i := range lens {
		lens[i] = size
	}
	return lens
}

func TestCompletionStartsWhenQuiet(t *testing.T) {
	x := makeBlob(t, 50, evenly(256, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		m := newManager(t, Options{Readahead: -1})
		defer m.Close()
		b := open(t, m, x.source(s))
		defer closeBlob(t, b)
		s.requests()
		time.Sleep(time.Hour)
		if log, _ := s.requests(); len(log) > 0 {
			t.Fatalf("%d requests before the first read", len(log))
		}
		for i := range 10 { // misses less than a second apart
			fill(t, b, x, int64(i)*1<<20, 4096)
			time.Sleep(900 * time.Millisecond)
		}
		if log, _ := s.requests(); len(log) != 10 {
			t.Errorf("%d requests for 10 misses", len(log))
		}
		start := time.Now()
		<-b.Done()
		took := time.Since(start)
		log, total := s.requests()
		check(t, b, x, 0, b.Size())
		if limit := x.entry.DataEnd(); total > limit || len(log) > int(limit/maxRequest)+20 {
			t.Errorf("%d requests, %d bytes of %d", len(log), total, limit)
		}
		if st := b.Stats(); !st.Complete || st.Present != b.Size() {
			t.Errorf("%+v", st)
		}
		if limit := 3 * time.Second; took > limit {
			t.Errorf("took %v", took)
		}
	})
}

// While somebody misses things, completion stands aside.
func TestCompletionYieldsToDemand(t *testing.T) {
	x := makeBlob(t, 51, evenly(400, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		s.rate /= 5 // so that there is something left to do
		m := newManager(t, Options{Readahead: -1})
		defer m.Close()
		b := open(t, m, x.source(s))
		defer closeBlob(t, b)
		fill(t, b, x, 0, 4096)
		time.Sleep(1200 * time.Millisecond) // it runs now
		s.requests()
		misses := int64(0)
		for i := 300; i < 360; i += 4 {
			off := int64(i) * 64 << 10
			if b.Ready(off, 4096) {
				continue
			}
			misses++
			fill(t, b, x, off, 4096)
			time.Sleep(50 * time.Millisecond)
		}
		log, _ := s.requests()
		if misses == 0 {
			t.Fatal("nothing was missed: the test shows nothing")
		}
		// What was in flight, and one more where the first miss overtakes it.
		if background := int64(len(log)) - misses; background > completionRequests {
			t.Errorf("%d background requests beside %d misses", background, misses)
		}
		<-b.Done()
	})
}

func TestCompletionComesBackAfterFailures(t *testing.T) {
	x := makeBlob(t, 52, evenly(64, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		var lines lineCounter
		m := newManager(t, Options{Readahead: -1, Logger: slog.New(slog.NewTextHandler(&lines, nil))})
		defer m.Close()
		b := open(t, m, x.source(s))
		defer closeBlob(t, b)
		fill(t, b, x, 0, 4096)
		s.setFault(func(context.Context, []byte, int64) error { return errors.New("the network is down") })
		s.requests()
		time.Sleep(time.Hour)
		log, _ := s.requests()
		if len(log) < 10 || len(log) > 1000 {
			t.Errorf("%d requests in an hour without network", len(log))
		}
		if n := lines.n.Load(); n != 1 {
			t.Errorf("%d log lines", n)
		}
		s.setFault(nil)
		time.Sleep(3 * time.Minute)
		select {
		case <-b.Done():
		default:
			t.Error("not complete after the network came back")
		}
	})
}

type lineCounter struct{ n atomic.Int64 }

func (c *lineCounter) Write(p []byte) (int, error) {
	c.n.Add(int64(strings.Count(string(p), "\n")))
	return len(p), nil
}

// One unit that is wrong at the source does not keep the others away.
func TestCompletionPassesABadUnit(t *testing.T) {
	x := makeBlob(t, 53, evenly(64, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		m := newManager(t, Options{Readahead: -1})
		defer m.Close()
		b := open(t, m, x.source(s))
		defer closeBlob(t, b)
		bad := b.table.Unit(40)
		s.setFault(func(_ context.Context, p []byte, off int64) error {
			if i := bad.COff - off; i >= 0 && i < int64(len(p)) {
				p[i+bad.CLen/2] ^= 1
			}
			return nil
		})
		fill(t, b, x, 0, 4096)
		time.Sleep(time.Minute)
		if st := b.Stats(); st.Present != b.Size()-bad.Len || st.Complete || st.Corrupt == 0 {
			t.Errorf("%+v", st)
		}
		s.setFault(nil)
		time.Sleep(5 * time.Minute)
		<-b.Done()
		check(t, b, x, 0, b.Size())
	})
}

func TestNoCompletion(t *testing.T) {
	x := makeBlob(t, 54, evenly(64, 64<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		m := newManager(t, quietOptions())
		defer m.Close()
		b := open(t, m, x.source(s))
		defer closeBlob(t, b)
		fill(t, b, x, 0, 4096)
		time.Sleep(time.Hour)
		if st := b.Stats(); st.Requests != 1 {
			t.Errorf("%+v", st)
		}
		fill(t, b, x, 0, b.Size()) // complete all the same
		<-b.Done()
	})
}

// Who reads everything in order runs at the speed of the link, with and without
// completion, and nothing is fetched twice.
func TestSequentialReadRunsAtLinkSpeed(t *testing.T) {
	x := makeBlob(t, 55, evenly(512, 64<<10))
	for _, noCompletion := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := slowLink(x)
			m := newManager(t, Options{NoCompletion: noCompletion})
			defer m.Close()
			b := open(t, m, x.source(s))
			defer closeBlob(t, b)
			s.requests()
			start := time.Now()
			for off := int64(0); off < b.Size(); off += 128 << 10 {
				if !b.Ready(off, 128<<10) {
					if err := b.Fill(t.Context(), off, 128<<10); err != nil {
						t.Fatal(err)
					}
				}
			}
			took := time.Since(start)
			check(t, b, x, 0, b.Size())
			log, total := s.requests()
			raw := time.Duration(float64(x.entry.DataEnd()) / s.rate * 1e9)
			if took > raw*12/10 {
				t.Errorf("no completion %v: took %v, the raw transfer takes %v", noCompletion, took, raw)
			}
			if total > x.entry.DataEnd()*101/100 || len(log) > 100 {
				t.Errorf("no completion %v: %d requests, %d bytes of %d", noCompletion, len(log), total, x.entry.DataEnd())
			}
		})
	}
}

// Reads here and there do not make a stream: what is fetched beside them is bounded.
func TestRandomReadsFetchLittle(t *testing.T) {
	x := makeBlob(t, 56, evenly(2048, 16<<10))
	synctest.Test(t, func(t *testing.T) {
		s := slowLink(x)
		m := newManager(t, Options{NoCompletion: true})
		defer m.Close()
		b := open(t, m, x.source(s))
		defer closeBlob(t, b)
		s.requests()
		const reads = 16
		for i := range reads {
			fill(t, b, x, int64(i*37%reads)*(b.Size()/reads)&^4095, 4096)
			time.Sleep(100 * time.Millisecond)
		}
		if log, total := s.requests(); total > reads*(firstWindow+64<<10) || len(log) > 3*reads {
			t.Errorf("%d requests, %d bytes for %d reads", len(log), total, reads)
		}
	})
}

// Background work never takes the memory that demand needs.
func TestDemandHasAReserve(t *testing.T) {
	mem := newMemory(minMemory)
	defer mem.Close()
	var grants []grant
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		g, err := mem.acquire(ctx, 256<<10, completion)
		cancel()
		if err != nil {
			break
		}
		grants = append(grants, g)
	}
	g, err := mem.acquire(t.Context(), 256<<10, demand)
	if err != nil || len(grants) == 0 {
		t.Fatalf("%v, %d grants", err, len(grants))
	}
	g.release()
	for _, g := range grants {
		g.release()
	}
	// More than there is waits for all of it, not forever.
	g, err = mem.acquire(t.Context(), 1<<40, completion)
	if err != nil {
		t.Fatal(err)
	}
	g.release()
}

// What lies in the pool, handed out and kept, is bounded.
func TestPoolKeepsLittle(t *testing.T) {
	mem := newMemory(0)
	defer mem.Close()
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for _, n := range []int64{1, minBuffer, minBuffer + 1, 300 << 10, 1 << 20, 3 << 20} {
				p := mem.buffer(n)
				if int64(len(p)) != n || int64(cap(p)) > mem.weight(n) {
					t.Errorf("buffer of %d bytes: %d, capacity %d, weight %d", n, len(p), cap(p), mem.weight(n))
				}
				mem.recycle(p)
			}
		})
	}
	wg.Wait()
	if mem.kept > maxKept {
		t.Errorf("%d bytes kept", mem.kept)
	}
}
