package cachefiles_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
)

// TestRounds is 10 000 rounds of everything at once, with messages that no kernel
// sends between them, and the death of the cache at the end: no panic, no
// descriptor and no goroutine left, and the fake kernel sees each request
// answered once.
func TestRounds(t *testing.T) {
	const rounds, workers, keys = 10000, 8, 12
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	k := cachefilestest.New(t)
	h := handle()
	for i := range keys {
		b := newBlob(Key{img.Volume, fmt.Sprint("blob", i)}, 128<<10+i)
		b.fill = func(ctx context.Context, off, n int64) error { return fickle(ctx, b, off, n) }
		b.open = func(context.Context, *blob) (Object, error) { return fickleOpen(b) }
		h.list[b.key] = b
	}
	d := k.Device()
	s := start(t, d, h, Options{MaxInFlight: 6, MaxInFlightBytes: 256 << 10, Deadline: 20 * time.Millisecond})
	var wg sync.WaitGroup
	for w := range workers {
		rng := rand.New(rand.NewPCG(seed, uint64(w)))
		wg.Go(func() {
			for i := range rounds / workers {
				round(t, k, h, rng, uint32(1<<30+w<<20+i))
				if key := (Key{img.Volume, fmt.Sprint("blob", rng.IntN(keys))}); rng.IntN(4) == 0 {
					if err := d.Cull(key); err != nil && !errors.Is(err, ErrInUse) && !errors.Is(err, fs.ErrNotExist) {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	// The cache dies with requests under way.
	for w := range workers {
		rng := rand.New(rand.NewPCG(seed+1, uint64(w)))
		wg.Go(func() {
			for i := range 100 {
				round(t, k, h, rng, uint32(1<<31+w<<20+i))
			}
		})
	}
	until(t, "some READs are under way", func() bool { return s.Stats().InFlight > 0 })
	k.Die()
	wg.Wait()
	if err := s.wait(); !errors.Is(err, unix.EIO) {
		t.Errorf("Serve: %v", err)
	}
	t.Logf("%+v", s.Stats())
	if got := s.Stats(); got.Filled == 0 || got.Failed == 0 || got.Dropped == 0 || got.Refused == 0 || got.Malformed == 0 || got.Unknown == 0 {
		t.Errorf("something never happened: %+v", got)
	}
	for key, b := range h.list {
		// every accepted or half-accepted object was closed once
		if opened, closed := b.opens.Load(), b.closes.Load(); closed > opened {
			t.Errorf("%v was opened %d times and closed %d times", key, opened, closed)
		}
	}
}

// fickle fills, fails, panics, stops half-way or takes too long.
func fickle(ctx context.Context, b *blob, off, n int64) error {
	switch rand.IntN(20) {
	case 0:
		return errors.New("backend down")
	case 1:
		panic("oops")
	case 2:
		return b.write(off, page)
	case 3:
		<-ctx.Done()
		return ctx.Err()
	case 4:
		<-ctx.Done()
		time.Sleep(time.Millisecond)
		return b.write(off, n)
	}
	return b.write(off, n)
}

func fickleOpen(b *blob) (Object, error) {
	switch rand.IntN(10) {
	case 0:
		return nil, unix.ENOENT
	case 1:
		panic("oops")
	}
	return b, nil
}

// round does one thing that EROFS does, or one that it does not.
func round(t *testing.T, k *cachefilestest.Kernel, h *blobs, rng *rand.Rand, id uint32) {
	key := Key{img.Volume, fmt.Sprint("blob", rng.IntN(len(h.list)))}
	object := uint32(rng.IntN(2000)) + 1<<20 // numbers that no object has
	switch rng.IntN(16) {
	case 0: // duplicate and stale numbers of messages and objects
		k.Send(cachefilestest.ReadMessage(id, object, 0, page), false)
		k.Send(cachefilestest.ReadMessage(id, object, 0, page), false)
		return
	case 1:
		k.Send(cachefilestest.Message(id, cachefilestest.OpClose, object), false)
		return
	case 2:
		k.Send(cachefilestest.OpenMessage(id, object, 0, key.Volume, key.Cookie), true)
		return
	case 3: // truncated, or with more than there should be
		m := cachefilestest.OpenMessage(id, object, -1, key.Volume, key.Cookie)
		k.Send(m[:4+rng.IntN(len(m)-4)], false)
		return
	case 4:
		p := make([]byte, 4+rng.IntN(1020))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		copy(p, []byte{byte(id), byte(id >> 8), byte(id >> 16), byte(id >> 24), 2 + byte(rng.IntN(3))})
		k.Send(p, false)
		return
	}
	o, err := k.Open(t.Context(), key)
	if err != nil {
		return
	}
	defer o.Close()
	for range 1 + rng.IntN(3) {
		ctx, cancel := t.Context(), context.CancelFunc(func() {})
		if rng.IntN(10) == 0 {
			ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(2000))*time.Microsecond)
		}
		if rng.IntN(3) == 0 { // whatever is there
			_ = o.Ask(ctx, int64(rng.IntN(32))*page, int64(1+rng.IntN(8))*page)
		}
		off := rng.IntN(100 << 10)
		p := make([]byte, 1+rng.IntN(20<<10))
		if err := o.ReadAt(ctx, p, int64(off)); err == nil && string(p) != string(h.list[key].data[off:off+len(p)]) {
			t.Errorf("wrong bytes at %d", off)
		}
		cancel()
	}
}
