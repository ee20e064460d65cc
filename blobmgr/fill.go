package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/failpoint"
)

const (
	// maxRequest bounds the stored bytes of one read of a backend: above it parallel
	// requests are better (performance.md 2.2, 2.3).
	maxRequest = 1 << 20
	// maxFlight bounds the plain bytes of one flight.
	maxFlight = 4 << 20
	// maxGap is how many stored bytes that no image needs are read to save a request.
	maxGap = 16 << 10
	// maxFill bounds the plain bytes that one Fill has in flight.
	maxFill = 8 << 20
)

// Ready reports whether all of [off, off+n) is present. It never blocks, does no I/O
// and allocates nothing. Offsets past Size need nothing.
func (b *Blob) Ready(off, n int64) bool {
	first, last, err := b.span(off, n)
	if err != nil || !b.present.all(first, last) {
		return false
	}
	b.touch(off, n)
	b.ahead.passed(first, last)
	return true
}

// Fill makes [off, off+n) of the cache file present. Concurrent calls for the same
// units share one fetch, which is cancelled when its last waiter leaves. Offsets past
// Size need nothing.
//
// The error is a *chunk.CorruptError when every source has wrong bytes, ctx.Err when
// ctx ended first, os.ErrClosed after Close, ENOSPC when the cache directory is
// full. A range that no image of the blob knows digests for is an error. Nothing of an
// error is remembered: the next Fill tries anew.
func (b *Blob) Fill(ctx context.Context, off, n int64) error {
	first, last, err := b.span(off, n)
	if err == nil {
		b.touch(off, n)
	}
	if err == nil && b.present.all(first, last) {
		b.ahead.passed(first, last)
		return nil
	}
	if err == nil {
		start := time.Now()
		err = b.fill(ctx, first, last)
		b.m.metrics.fillWait.Observe(time.Since(start).Seconds())
	}
	if err != nil {
		return fmt.Errorf("fill blob %s at %d, %d bytes: %w", b.name, off, n, err)
	}
	return nil
}

// span returns the units of [off, off+n).
func (b *Blob) span(off, n int64) (first, last int, err error) {
	if off < 0 || n < 0 {
		return 0, 0, fs.ErrInvalid
	}
	if off >= b.size || n == 0 {
		return 0, 0, nil
	}
	n = min(n, b.size-off)
	return b.table.UnitAt(off), b.table.UnitAt(off+n-1) + 1, nil
}

// fill makes the units [first, last) present, a bounded part of them at a time; again
// when some were evicted meanwhile.
func (b *Blob) fill(ctx context.Context, first, last int) error {
	for !b.present.all(first, last) {
		if err := b.fillParts(ctx, first, last); err != nil {
			return err
		}
	}
	return nil
}

func (b *Blob) fillParts(ctx context.Context, first, last int) error {
	for next := true; first < last; next = false {
		part := first + 1
		for end := b.table.Unit(first).Off + maxFill; part < last && b.table.Unit(part).Off < end; part++ {
		}
		if err := b.fillPart(ctx, first, part, next); err != nil {
			return err
		}
		first = part
	}
	return nil
}

// maxUnasked is how many failures of flights that nobody asked for a read passes over.
const maxUnasked = 3

// fillPart fills [first, last); miss says that this is where a read begins.
func (b *Blob) fillPart(ctx context.Context, first, last int, miss bool) error {
	spare, pleaded := maxUnasked, false
	for !b.present.all(first, last) {
		flights, launched, err := b.join(first, last)
		if err != nil {
			return err
		}
		switch { // after the demanded units are on their way
		case miss && launched:
			b.ahead.missed(first, last)
		case miss:
			b.ahead.passed(first, last)
		}
		miss = false
		for _, f := range flights {
			if err == nil {
				err = b.wait(ctx, f, first, last)
			}
			if err != nil && f.kind != demand && spare > 0 && ctx.Err() == nil {
				spare--
				err = nil // given up earlier than a read is, because nobody waited for it
			}
			b.leave(f)
		}
		if err != nil && !pleaded && diskFull(err) {
			pleaded = true
			if b.m.makeRoom(ctx) {
				err = nil
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// join makes the caller a waiter of a flight for every absent unit of [first, last).
// launched says that there was none yet for some of them.
func (b *Blob) join(first, last int) (flights []*flight, launched bool, err error) {
	b.digests.RLock()
	defer b.digests.RUnlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, false, os.ErrClosed
	}
	var absent []int
	for u := b.present.next(first, last); u < last; u = b.present.next(u+1, last) {
		f := b.filling[u]
		switch {
		case !b.table.Needed(u):
			return nil, false, b.abandon(flights, fmt.Errorf("no image has a digest for chunk %d: the image that is read is not the one that was opened", b.table.Unit(u).First))
		case f == nil:
			absent = append(absent, u)
		case !slices.Contains(flights, f):
			f.waiters++
			flights = append(flights, f)
		}
	}
	launched = len(absent) > 0
	if launched && b.rests {
		b.rests = false
		b.nudgeLocked()
	}
	for len(absent) > 0 {
		n := b.group(absent)
		flights = append(flights, b.launch(absent[:n:n], demand, grant{}))
		absent = absent[n:]
	}
	b.begin()
	return flights, launched, nil
}

// abandon undoes what join did to flights. The caller holds mu.
func (b *Blob) abandon(flights []*flight, err error) error {
	for _, f := range flights {
		f.waiters--
	}
	return err
}

// group returns how many of units, which are ascending, one flight should take.
func (b *Blob) group(units []int) int {
	x := b.table.Unit(units[0])
	start, end, plain := x.COff, x.COff+x.CLen, x.Len
	for i, u := range units[1:] {
		x = b.table.Unit(u)
		plain += x.Len
		if x.COff < end || x.COff-end > maxGap || b.neededBetween(units[i], u) || x.COff+x.CLen-start > maxRequest || plain > maxFlight {
			return i + 1
		}
		end = x.COff + x.CLen
	}
	return len(units)
}

// neededBetween reports whether a unit between two others is needed: it is present or on
// its way, and no byte of it is fetched twice.
func (b *Blob) neededBetween(u, v int) bool {
	for u++; u < v; u++ {
		if b.table.Needed(u) {
			return true
		}
	}
	return false
}

// fetch reads units from o and stores them. It returns the ones that another origin
// should be asked for; why they failed is in f.errs.
func (b *Blob) fetch(ctx context.Context, f *flight, o *origin, units []int) []int {
	off, end := b.stretch(units)
	blob, err := o.open(ctx, b.entry.DataEnd())
	if err == nil {
		b.requests.Add(1)
		b.m.metrics.requests.WithLabelValues(f.kind.String()).Inc()
		failpoint.Hit("blobmgr.fetch")
		err = blob.ReadAt(ctx, f.buf[:end-off], off)
		failpoint.Hit("blobmgr.fetched")
	}
	if err != nil {
		if ctx.Err() == nil {
			b.proven.Store(0)
		}
		f.fail(units, err)
		return units
	}
	b.proven.Store(b.m.clock.Load())
	b.fetched.Add(end - off)
	if f.kind == completion {
		b.account(end - off)
	}
	b.m.metrics.fetched.WithLabelValues(f.kind.String()).Add(float64(end - off))
	var failed []int
	for _, run := range b.runs(units) {
		failed = append(failed, b.store(ctx, f, run, off)...)
	}
	return failed
}

// runs cuts units into runs that lie together in the cache file and fit a worker's
// buffer.
func (b *Blob) runs(units []int) [][]int {
	var runs [][]int
	begin, plain := 0, int64(0)
	for i, u := range units {
		n := b.table.Unit(u).Len
		if i > begin && (units[i-1] != u-1 || plain+n > stepLen) {
			runs = append(runs, units[begin:i])
			begin, plain = i, 0
		}
		plain += n
	}
	return append(runs, units[begin:])
}

// store decodes the units of run, which f.buf holds from stored offset base on, and
// writes them. It returns those whose bytes are wrong.
func (b *Blob) store(ctx context.Context, f *flight, run []int, base int64) (failed []int) {
	first, last := b.table.Unit(run[0]), b.table.Unit(run[len(run)-1])
	w, err := b.m.memory.worker(ctx, last.Off+last.Len-first.Off)
	if err != nil {
		f.fail(run, err)
		return run
	}
	defer b.m.memory.done(w)
	gen := b.gen.Load()
	good := 0 // run[good:i] is decoded and not written
	for i, u := range run {
		x := b.table.Unit(u)
		dst := w.buf[x.Off-first.Off:][:x.Len]
		if err := b.decode(w, u, dst, f.buf[x.COff-base:][:x.CLen]); err != nil {
			if errors.Is(err, chunk.ErrCorrupt) {
				b.corrupt.Add(1)
				b.m.metrics.corrupt.Inc()
			}
			f.fail(run[i:i+1], err)
			failed = append(failed, u)
			b.write(f, run[good:i], w.buf, first.Off, gen)
			good = i + 1
		}
	}
	b.write(f, run[good:], w.buf, first.Off, gen)
	return failed
}

func (b *Blob) decode(w *worker, u int, dst, src []byte) error {
	b.digests.RLock()
	defer b.digests.RUnlock()
	return w.decoder.Decode(b.table, u, dst, src)
}

// write writes units, which lie together and whose plain bytes buf holds from cache
// file offset base on, and marks them. There is one write for all of them.
func (b *Blob) write(f *flight, units []int, buf []byte, base int64, gen uint64) {
	if len(units) == 0 {
		return
	}
	first, last := b.table.Unit(units[0]), b.table.Unit(units[len(units)-1])
	if _, err := b.cache.WriteAt(buf[first.Off-base:last.Off+last.Len-base], first.Off); err != nil {
		f.fail(units, fmt.Errorf("write cache file %s: %w", b.Path(), full(err)))
		return
	}
	failpoint.Hit("blobmgr.written")
	b.mark(units, gen)
	failpoint.Hit("blobmgr.marked")
}

// recheck verifies the suspect units of a flight in the cache file and returns the
// units that must be fetched.
func (b *Blob) recheck(ctx context.Context, units []int) []int {
	var suspect, absent []int
	b.mu.Lock()
	for _, u := range units {
		if b.suspect.has(u) {
			suspect = append(suspect, u)
		} else {
			absent = append(absent, u)
		}
	}
	b.mu.Unlock()
	if len(suspect) == 0 {
		return units
	}
	for _, run := range b.runs(suspect) {
		absent = append(absent, b.verify(ctx, run)...)
	}
	slices.Sort(absent)
	return absent
}

// verify marks the units of run whose bytes in the cache file are right and returns
// the others.
func (b *Blob) verify(ctx context.Context, run []int) (wrong []int) {
	first, last := b.table.Unit(run[0]), b.table.Unit(run[len(run)-1])
	n := last.Off + last.Len - first.Off
	w, err := b.m.memory.worker(ctx, n)
	if err != nil {
		return run
	}
	defer b.m.memory.done(w)
	gen := b.gen.Load()
	if _, err := b.cache.ReadAt(w.buf[:n], first.Off); err != nil {
		return run
	}
	var right []int
	for _, u := range run {
		x := b.table.Unit(u)
		if b.sound(u, w.buf[x.Off-first.Off:][:x.Len]) {
			right = append(right, u)
		} else {
			wrong = append(wrong, u)
		}
	}
	b.mark(right, gen)
	return wrong
}

func diskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// sound reports whether p is unit u, and writes it again if the disk may not have it.
func (b *Blob) sound(u int, p []byte) bool {
	err := b.matches(u, p)
	b.mu.Lock()
	again := b.cached.has(u)
	b.mu.Unlock()
	if err == nil && again {
		_, err = b.cache.WriteAt(p, b.table.Unit(u).Off)
	}
	return err == nil
}

// matches is an error unless p is unit u.
func (b *Blob) matches(u int, p []byte) error {
	b.digests.RLock()
	defer b.digests.RUnlock()
	return b.table.Verify(u, p)
}

// full adds to a write error what helps.
func full(err error) error {
	if diskFull(err) {
		return fmt.Errorf("%w: free space in the cache directory", err)
	}
	return err
}
