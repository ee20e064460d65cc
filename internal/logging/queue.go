package logging

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

const (
	// queueRecords and queueBytes bound what waits to be written.
	queueRecords = 8192
	queueBytes   = 4 << 20
)

// A sink takes whole lines. Only the queue's goroutine calls it.
type sink interface {
	write(line []byte) error
	close() error
}

// stream is a sink that somebody else closes.
type stream struct{ w io.Writer }

func (s stream) write(line []byte) error {
	_, err := s.w.Write(line)
	return err
}

func (s stream) close() error { return nil }

// A queue is an io.Writer of lines that never waits and never fails.
type queue struct {
	lines chan []byte
	bytes atomic.Int64 // in lines
	lost  atomic.Int64 // since the start
	once  sync.Once
	quit  chan struct{} // closed: write what there is and end
	done  chan struct{} // closed: ended
	err   error         // of closing; after done

	// For the goroutine:
	out    sink
	report func(w io.Writer, lost int64, err error) // writes a line about losses
	told   int64                                    // of lost
	last   error                                    // of the last write that failed, since the last report
}

func newQueue() *queue {
	return &queue{lines: make(chan []byte, queueRecords), quit: make(chan struct{}), done: make(chan struct{})}
}

// start begins to write to out, which the queue owns from now on.
func (q *queue) start(out sink, report func(w io.Writer, lost int64, err error)) {
	q.out, q.report = out, report
	go q.run()
}

// Write takes one line, or counts it as lost.
func (q *queue) Write(p []byte) (int, error) {
	select {
	case <-q.quit:
		q.lost.Add(1)
		return len(p), nil
	default:
	}
	n := int64(len(p))
	if q.bytes.Add(n) > queueBytes {
		q.bytes.Add(-n)
		q.lost.Add(1)
		return len(p), nil
	}
	select {
	case q.lines <- bytes.Clone(p):
	default:
		q.bytes.Add(-n)
		q.lost.Add(1)
	}
	return len(p), nil
}

func (q *queue) run() {
	defer close(q.done)
	for {
		select {
		case line := <-q.lines:
			q.write(line)
		case <-q.quit:
			q.drain()
			q.err = q.out.close()
			return
		}
	}
}

func (q *queue) drain() {
	for {
		select {
		case line := <-q.lines:
			q.write(line)
		default:
			return
		}
	}
}

// write writes a line and, when that works again, what was lost before.
func (q *queue) write(line []byte) {
	q.bytes.Add(-int64(len(line)))
	if err := q.out.write(line); err != nil {
		q.lost.Add(1)
		q.last = err
		return
	}
	lost := q.lost.Load()
	if lost == q.told {
		return
	}
	var text bytes.Buffer
	q.report(&text, lost-q.told, q.last)
	if err := q.out.write(text.Bytes()); err == nil {
		q.told, q.last = lost, nil
	}
}

func (q *queue) close(ctx context.Context) error {
	q.once.Do(func() { close(q.quit) })
	select {
	case <-q.done:
		return q.err
	default:
	}
	select {
	case <-q.done:
		return q.err
	case <-ctx.Done():
		return fmt.Errorf("flush log, %d records are left: %w", len(q.lines), ctx.Err())
	}
}
