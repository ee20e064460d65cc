package blobmgr

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/erofsd/erofsd/internal/chunk"
	"golang.org/x/time/rate"
)

// ScrubOptions say what of a cache is looked at, and how fast.
type ScrubOptions struct {
	// Rate bounds how many bytes are read in a second. Default 50 MiB.
	Rate int64
	// Domain and IDs, as [Blob.ID] returns them, name the blobs. No IDs: all there are,
	// in every domain.
	Domain string
	IDs    []string
	// Reopen is called before something of b becomes absent that was present, so that
	// its readers ask again from then on also if b was complete. release is called when
	// Scrub is done with b, which may have further to go. An error: it stays as it is.
	// Nil: nothing is needed.
	Reopen func(b *Blob) (release func(), err error)
}

// A ScrubReport is what a scrub found. Wrong = Repaired + Unrepaired.
type ScrubReport struct {
	Blobs, Units, Bytes int64 // that were verified
	Wrong               int64 // units
	// Repaired units have the right bytes again or, of blobs that nobody has open, are
	// fetched when they are read.
	Repaired int64
	// Unrepaired units could not be fetched, and are errors to who reads them; or could
	// not even be made absent.
	Unrepaired int64
	Errors     []string // why, and which blobs could not be read; the first ones
}

const (
	defaultScrubRate = 50 << 20
	maxScrubErrors   = 100
)

// ErrNoScrub says that a cache cannot be scrubbed: its files are the kernel's.
var ErrNoScrub = errors.New("the cache files are the kernel's, and what it lets us have of them can be written but not read (cachefiles): remove an image, or unmount it and let it be evicted, to have it fetched again")

// Scrub verifies what is present in open blobs, and what the clean marks of others list,
// against its digests. A wrong unit of an open blob is made absent and fetched again, one
// of another is taken from its mark. It finds what changed on the disk; a page that the
// kernel still has in its cache is right as long as that has it.
//
// One scrub runs at a time, others wait. The error is ctx.Err, os.ErrClosed when m is
// closed, or [ErrNoScrub] with Options.Attached; what was wrong is in the report, also
// with an error.
func (m *Manager) Scrub(ctx context.Context, o ScrubOptions) (ScrubReport, error) {
	s := &scrub{m: m, o: o}
	if m.opt.Attached {
		return s.report, fmt.Errorf("scrub: %w", ErrNoScrub)
	}
	ctx, end, err := m.beginScrub(ctx)
	if err != nil {
		return s.report, fmt.Errorf("scrub: %w", err)
	}
	defer end()
	if o.Rate <= 0 {
		o.Rate = defaultScrubRate
	}
	s.pace = rate.NewLimiter(rate.Limit(o.Rate), stepLen)
	s.buf = pages(stepLen)
	names, err := s.names()
	for _, name := range names {
		if err == nil {
			err = s.one(ctx, name)
		}
	}
	if err != nil {
		return s.report, fmt.Errorf("scrub: %w", err)
	}
	return s.report, nil
}

// beginScrub waits until no other scrub runs. ctx ends with m.
func (m *Manager) beginScrub(ctx context.Context) (_ context.Context, end func(), err error) {
	if err := m.scrubbing.take(ctx); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		m.scrubbing.give()
		cancel(nil)
		return nil, nil, os.ErrClosed
	}
	m.stopScrub = cancel
	return ctx, func() {
		cancel(nil)
		m.scrubbing.give()
	}, nil
}

// endScrub ends a scrub that runs, for good. The caller has closed m.
func (m *Manager) endScrub() {
	m.mu.Lock()
	stop := m.stopScrub
	m.mu.Unlock()
	if stop != nil {
		stop(os.ErrClosed)
	}
	m.scrubbing <- struct{}{} // and not given back: nobody waits who does not look at closed
	m.scrubbing.give()
}

// A scrub is one run.
type scrub struct {
	m      *Manager
	o      ScrubOptions
	pace   *rate.Limiter
	buf    []byte
	report ScrubReport
}

func (s *scrub) names() (names []string, err error) {
	if len(s.o.IDs) == 0 {
		return s.m.dir.names(metaSuffix)
	}
	for _, id := range s.o.IDs {
		names = append(names, Source{Domain: s.o.Domain}.scoped(id))
	}
	return names, nil
}

// one scrubs the blob called file, whether it is open or not. It may become so, or cease
// to be, at any time: then the rest is done in the other way.
func (s *scrub) one(ctx context.Context, file string) error {
	s.report.Blobs++
	for at, again := 0, true; again; {
		b, err := s.m.peek(ctx, file)
		if err != nil {
			return err
		}
		if b != nil {
			at, again, err = s.open(ctx, b, at)
		} else {
			at, again, err = s.closed(ctx, file, at)
		}
		if ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded) {
			return cmp.Or(context.Cause(ctx), err)
		}
		if err != nil {
			s.fail("blob %s: %v", file, err)
			return nil
		}
	}
	return nil
}

// peek returns the blob called file if it is open.
func (m *Manager) peek(ctx context.Context, file string) (*Blob, error) {
	n, err := m.take(ctx, file)
	if err != nil {
		return nil, err
	}
	defer m.drop(file, n)
	defer n.turn.give()
	return n.blob, nil
}

func (s *scrub) fail(format string, args ...any) {
	if len(s.report.Errors) < maxScrubErrors {
		s.report.Errors = append(s.report.Errors, fmt.Sprintf(format, args...))
	}
}

// wrong accounts for a wrong unit and what became of it.
func (s *scrub) wrong(file string, off int64, err error) {
	s.report.Wrong++
	s.m.metrics.scrubWrong.Inc()
	if err == nil {
		s.report.Repaired++
		s.m.metrics.scrubRepaired.Inc()
		s.m.log.Warn("scrub found wrong bytes in the cache", "blob", file, "offset", off)
		return
	}
	s.report.Unrepaired++
	s.m.metrics.scrubUnrepaired.Inc()
	s.m.log.Error("scrub found wrong bytes in the cache and could not repair them", "blob", file, "offset", off, "err", err)
	s.fail("blob %s at %d: %v", file, off, err)
}

// units returns the next units [first, last) of listed from at on that the buffer takes;
// first == last: there are none.
func (s *scrub) units(t *chunk.Table, listed bitmap, at int) (first, last int) {
	for first = at; first < t.Units() && !(listed.has(first) && t.Needed(first)); first++ {
	}
	n := int64(0)
	for last = first; last < t.Units() && listed.has(last) && t.Needed(last); last++ {
		if n += t.Unit(last).Len; n > stepLen && last > first {
			break
		}
	}
	return first, last
}

// wait waits until units [first, last) may be read.
func (s *scrub) wait(ctx context.Context, t *chunk.Table, first, last int) error {
	end := t.Unit(last - 1)
	n := end.Off + end.Len - t.Unit(first).Off
	for left := n; left > 0; left -= stepLen {
		if err := s.pace.WaitN(ctx, int(min(left, stepLen))); err != nil {
			return cmp.Or(context.Cause(ctx), context.DeadlineExceeded) // the latter ahead of its time
		}
	}
	s.report.Bytes += n
	s.report.Units += int64(last - first)
	s.m.metrics.scrubBytes.Add(float64(n))
	return nil
}

// read returns what f has of the units [first, last).
func (s *scrub) read(f cacheFile, t *chunk.Table, first, last int) ([]byte, error) {
	off, end := t.Unit(first).Off, t.Unit(last-1)
	n := end.Off + end.Len - off
	if n > int64(len(s.buf)) { // a single large unit
		s.buf = pages(n)
	}
	p := s.buf[:n]
	_, err := f.ReadAt(p, off)
	return p, err
}
