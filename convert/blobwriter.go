package convert

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"syscall"

	"github.com/erofsd/erofsd/internal/chunk"
)

// writeBehind is after how many bytes the kernel is asked to begin writing them
// out, so that the fsync at the end finds little to do.
const writeBehind = 8 << 20

// A blobWriter writes and digests the bytes of one blob in its own goroutine.
type blobWriter struct {
	f           *os.File
	durable     bool
	sum         hash.Hash
	size        int64
	started     int64       // bytes that the kernel was asked to write out
	cur         []byte      // being filled
	empty, full chan []byte // the buffers go round
}

func newBlobWriter(f *os.File, durable bool) *blobWriter {
	const buffers = 4
	w := &blobWriter{
		f: f, durable: durable, sum: sha256.New(),
		empty: make(chan []byte, buffers), full: make(chan []byte, buffers),
	}
	for range buffers {
		w.empty <- make([]byte, 0, writeSize)
	}
	return w
}

// write appends p. It is the collector's, as is flush.
func (w *blobWriter) write(ctx context.Context, p []byte) error {
	for len(p) > 0 {
		if w.cur == nil {
			select {
			case w.cur = <-w.empty:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		n := min(len(p), cap(w.cur)-len(w.cur))
		w.cur = append(w.cur, p[:n]...)
		p = p[n:]
		if len(w.cur) == cap(w.cur) {
			if err := w.flush(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *blobWriter) flush(ctx context.Context) error {
	if len(w.cur) == 0 {
		return nil
	}
	select {
	case w.full <- w.cur:
		w.cur = nil
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// run writes what is flushed until full is closed.
func (w *blobWriter) run() error {
	for p := range w.full {
		w.sum.Write(p)
		n, err := w.f.Write(p)
		w.size += int64(n)
		if err != nil {
			return fmt.Errorf("write blob: %w", err)
		}
		if w.durable && w.size-w.started >= writeBehind {
			// SYNC_FILE_RANGE_WRITE; a hint, so an error does not matter.
			_ = syscall.SyncFileRange(int(w.f.Fd()), w.started, w.size-w.started, 2)
			w.started = w.size
		}
		w.empty <- p[:0]
	}
	return nil
}

// finish writes t behind the chunks and makes the file durable if it is to stay.
// It returns the blob's entry with its ID and the size of the file. It is called
// after run.
func (w *blobWriter) finish(t chunk.Tail) (chunk.Entry, int64, error) {
	all, err := w.sum.(hash.Cloner).Clone()
	if err != nil {
		return chunk.Entry{}, 0, err
	}
	t.DataLen, t.DataDigest = w.size, w.sum
	tail := &counter{}
	e, err := chunk.WriteTail(io.MultiWriter(w.f, all, tail), t)
	if err == nil && w.durable {
		err = w.f.Sync()
	}
	e.ID = hex.EncodeToString(all.Sum(nil))
	return e, w.size + tail.n, err
}

// A counter counts the bytes written to it.
type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}
