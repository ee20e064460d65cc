package blobmgr

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// rot changes a byte of unit u of x's cache file.
func rot(t *testing.T, b *Blob, u int) {
	t.Helper()
	f, err := os.OpenFile(b.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, x := make([]byte, 1), b.table.Unit(u)
	if _, err := f.ReadAt(p, x.Off+x.Len/2); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 4
	if _, err := f.WriteAt(p, x.Off+x.Len/2); err != nil {
		t.Fatal(err)
	}
}

func scrubAll(t *testing.T, m *Manager, o ScrubOptions) ScrubReport {
	t.Helper()
	if o.Rate == 0 {
		o.Rate = 1 << 40
	}
	r, err := m.Scrub(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if r.Wrong != r.Repaired+r.Unrepaired {
		t.Errorf("%+v", r)
	}
	return r
}

// A wrong unit of a complete blob is absent for its readers, who have been told, until it
// is right again; and Done is open for as long.
func TestScrubOpen(t *testing.T) {
	x := makeBlob(t, 70, lengths(70, 60))
	s := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	fill(t, b, x, 0, b.Size())
	<-b.Done()
	if r := scrubAll(t, m, ScrubOptions{}); r.Wrong != 0 || r.Units != 60 || r.Bytes != b.Size() || r.Blobs != 1 {
		t.Errorf("of a good blob: %+v", r)
	}
	rot(t, b, 7)
	rot(t, b, 40)
	done, told, released := b.Done(), 0, 0
	s.requests()
	s.setFault(func(context.Context, []byte, int64) error {
		if u := b.table.Unit(7); told == 0 || b.Ready(u.Off, u.Len) && released == 0 && b.Stats().Complete {
			t.Error("fetched while its readers were not told, or while they believed that it is there")
		}
		if _, err := os.Lstat(b.Path() + cleanSuffix); err == nil {
			t.Error("the mark vouches for what is written")
		}
		return nil
	})
	r := scrubAll(t, m, ScrubOptions{Reopen: func(of *Blob) (func(), error) {
		if told++; of != b || !b.Ready(0, b.Size()) {
			t.Error("told of another blob, or too late")
		}
		return func() { released++ }, nil
	}})
	if r.Wrong != 2 || r.Repaired != 2 || told != 1 || released != 1 {
		t.Errorf("%+v, told %d times, released %d times", r, told, released)
	}
	if log, _ := s.requests(); len(log) != 2 {
		t.Errorf("%d requests", len(log))
	}
	check(t, b, x, 0, b.Size())
	<-b.Done()
	if b.Done() == done {
		t.Error("Done was never open again")
	}
	if r := scrubAll(t, m, ScrubOptions{IDs: []string{b.ID()}}); r.Wrong != 0 || r.Units != 60 {
		t.Errorf("afterwards: %+v", r)
	}
}

// What cannot be fetched is an error to its readers, and not wrong bytes, until it can.
func TestScrubWithoutBackend(t *testing.T) {
	x := makeBlob(t, 71, lengths(71, 20))
	s := &store{stored: x.stored}
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(s))
	defer closeBlob(t, b)
	fill(t, b, x, 0, b.Size())
	rot(t, b, 3)
	s.setFault(func(context.Context, []byte, int64) error { return errors.New("the network is down") })
	r := scrubAll(t, m, ScrubOptions{})
	if r.Wrong != 1 || r.Unrepaired != 1 || len(r.Errors) != 1 || !strings.Contains(r.Errors[0], "network is down") {
		t.Errorf("%+v", r)
	}
	u := b.table.Unit(3)
	if b.Ready(u.Off, u.Len) || b.Fill(t.Context(), u.Off, u.Len) == nil {
		t.Error("wrong bytes are ready")
	}
	s.setFault(nil)
	fill(t, b, x, 0, b.Size())
}

// Readers that cannot be made to ask again keep what they have: a hole would be zeros.
func TestScrubWithoutReopen(t *testing.T) {
	x := makeBlob(t, 72, lengths(72, 20))
	m := newManager(t, quietOptions())
	b := open(t, m, x.source(&store{stored: x.stored}))
	defer closeBlob(t, b)
	fill(t, b, x, 0, b.Size())
	rot(t, b, 3)
	r := scrubAll(t, m, ScrubOptions{Reopen: func(*Blob) (func(), error) { return nil, errors.New("no marks left") }})
	if r.Unrepaired != 1 || !b.Ready(0, b.Size()) {
		t.Errorf("%+v, ready %v", r, b.Ready(0, b.Size()))
	}
}

// What is wrong of a blob that nobody has open is taken from its mark.
func TestScrubKept(t *testing.T) {
	x := makeBlob(t, 73, lengths(73, 20))
	m := newManager(t, quietOptions())
	s := &store{stored: x.stored}
	b := open(t, m, x.source(s))
	fill(t, b, x, 0, b.Size())
	closeBlob(t, b)
	for u := range 3 {
		rot(t, b, 5*u)
	}
	if r := scrubAll(t, m, ScrubOptions{}); r.Wrong != 3 || r.Repaired != 3 || r.Units != 20 {
		t.Errorf("%+v", r)
	}
	if r := scrubAll(t, m, ScrubOptions{}); r.Wrong != 0 || r.Units != 17 {
		t.Errorf("again: %+v", r)
	}
	s.requests()
	b = open(t, m, x.source(s))
	defer closeBlob(t, b)
	fill(t, b, x, 0, b.Size())
	if log, _ := s.requests(); len(log) != 3 {
		t.Errorf("%d requests", len(log))
	}
}

// A blob that is opened, read, closed, forgotten and damaged while it is scrubbed.
func TestScrubInTheMidst(t *testing.T) {
	x := makeBlob(t, 74, lengths(74, 40))
	m := newManager(t, quietOptions())
	s := &store{stored: x.stored}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := m.Scrub(ctx, ScrubOptions{Rate: 1 << 40}); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for i := range 40 {
		b := open(t, m, x.source(s))
		if i%2 == 0 {
			rot(t, b, i) // it may be read before it is found
			scrubAll(t, m, ScrubOptions{})
		}
		if err := b.Fill(t.Context(), 0, b.Size()); err != nil {
			t.Error(err)
		}
		check(t, b, x, 0, b.Size())
		closeBlob(t, b)
		if i%8 == 7 {
			if err := m.Forget(t.Context(), "", x.entry.ID); err != nil {
				t.Error(err)
			}
		}
	}
	stop()
	wg.Wait()
}

// A scrub ends with its manager, and with its context, though it has far to go.
func TestScrubEnds(t *testing.T) {
	x := makeBlob(t, 75, lengths(75, 100))
	o := quietOptions()
	o.Dir = filepath.Join(t.TempDir(), "cache")
	m, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	b := open(t, m, x.source(&store{stored: x.stored}))
	fill(t, b, x, 0, b.Size())
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := m.Scrub(ctx, ScrubOptions{Rate: 1}); err == nil {
		t.Error("no error at the end of the context")
	}
	ended := make(chan error)
	go func() {
		_, err := m.Scrub(context.Background(), ScrubOptions{Rate: 1})
		ended <- err
	}()
	for stop := false; !stop; time.Sleep(time.Millisecond) {
		m.mu.Lock()
		stop = m.stopScrub != nil
		m.mu.Unlock()
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("scrub of a manager that was closed: %v", err)
	}
	if _, err := m.Scrub(t.Context(), ScrubOptions{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("scrub of a closed manager: %v", err)
	}
}

func TestNoScrubOfAttached(t *testing.T) {
	o := quietOptions()
	o.Attached = true
	if _, err := newManager(t, o).Scrub(t.Context(), ScrubOptions{}); !errors.Is(err, ErrNoScrub) {
		t.Errorf("got %v", err)
	}
}
