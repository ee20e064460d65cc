package daemon

import (
	"context"
	"fmt"
	"os"

	"github.com/erofsd/erofsd/cachefiles"
)

// bootWindow is how much of a bootstrap is copied for one request, which asks for a
// page: the kernel reads metadata without readahead.
const bootWindow = 1 << 20

// A bootFile serves a bootstrap to cachefiles: the kernel wants the metadata in a
// file of its own as well. The private copy has been checked against its digest, by
// which the kernel knows it too.
type bootFile struct {
	f    *os.File
	size int64

	turn turn // held while copying; guards what follows
	to   *cachefiles.File
	have []bool // by window
}

func newBootFile(f *os.File, size int64) *bootFile {
	return &bootFile{f: f, size: size, turn: make(turn, 1)}
}

func (b *bootFile) Size() int64 { return b.size }

// attach makes to the file to copy into, unless it is that already.
func (b *bootFile) attach(ctx context.Context, to *cachefiles.File) error {
	if err := b.turn.take(ctx); err != nil {
		return err
	}
	defer b.turn.give()
	if b.to == to {
		return nil
	}
	have := make([]bool, (b.size+bootWindow-1)/bootWindow)
	err := to.Data(b.size, func(off, end int64) {
		for w := (off + bootWindow - 1) / bootWindow; w < int64(len(have)) && b.end(w) <= end; w++ {
			have[w] = true
		}
	})
	if err != nil {
		return fmt.Errorf("find data in the kernel's copy of a bootstrap: %w", err)
	}
	b.to, b.have = to, have
	return nil
}

// end returns where window w ends.
func (b *bootFile) end(w int64) int64 { return min((w+1)*bootWindow, b.size) }

func (b *bootFile) detach(from *cachefiles.File) {
	b.turn <- struct{}{} // held for the copy of a window only
	defer b.turn.give()
	if b.to == from {
		b.to = nil
	}
}

// Fill copies the windows of [off, off+n) that are not there yet.
func (b *bootFile) Fill(ctx context.Context, off, n int64) error {
	for w := off / bootWindow; w*bootWindow < min(off+n, b.size); w++ {
		if err := b.copy(ctx, w); err != nil {
			return fmt.Errorf("copy bootstrap %s for the kernel: %w", b.f.Name(), err)
		}
	}
	return nil
}

func (b *bootFile) copy(ctx context.Context, w int64) error {
	if err := b.turn.take(ctx); err != nil {
		return err
	}
	defer b.turn.give()
	if b.to == nil {
		return os.ErrClosed
	}
	if b.have[w] {
		return nil
	}
	off, end := w*bootWindow, b.end(w)
	p, free, err := cachefiles.AlignedBuffer(int(end - off)) // in whole pages, of zeros
	if err != nil {
		return err
	}
	defer free()
	if _, err := b.f.ReadAt(p[:end-off], off); err != nil {
		return err
	}
	if _, err := b.to.WriteAt(p, off); err != nil {
		return err
	}
	b.have[w] = true
	return nil
}

// A turn is a lock that may be held over I/O, so it is waited for with a context.
type turn chan struct{}

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t turn) give() { <-t }
