package cachefilestest

import (
	"context"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
)

// An object is what the kernel has open, once for each key.
type object struct {
	key     cachefiles.Key
	refs    int
	id      uint32 // changes with each OPEN
	opening *request
	first   *request // the first OPEN, which all who open wait for
	open    bool     // accepted
	dropped bool
	content *content
	attach  int   // calls that will still meet ENOBUFS
	file    *file // nil: closed
}

// An Object is one mount's use of an object.
type Object struct {
	k *Kernel
	o *object
}

// Open opens the object of key, or shares it with those who have it open. The
// error is the errno of a refusal, or ctx's.
func (k *Kernel) Open(ctx context.Context, key cachefiles.Key) (*Object, error) {
	k.mu.Lock()
	o := k.live[key]
	if o == nil {
		o = &object{key: key}
		k.live[key] = o
		o.opening = k.ask(&request{op: OpOpen, o: o})
		o.first = o.opening
	}
	o.refs++
	k.mu.Unlock()
	handle := &Object{k: k, o: o}
	select {
	case <-o.first.done:
	case <-ctx.Done():
		handle.Close()
		return nil, ctx.Err()
	}
	if o.first.err != nil {
		handle.Close()
		return nil, o.first.err
	}
	return handle, nil
}

// Size is what the daemon said.
func (h *Object) Size() int64 {
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	return h.o.content.size
}

// ID is the number that the object has now.
func (h *Object) ID() uint32 {
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	return h.o.id
}

// ReadAt reads as EROFS does: it asks for each hole, and reads what has become
// data then. The error is EIO when nothing has, or ctx's, which is the death of
// the reader.
func (h *Object) ReadAt(ctx context.Context, p []byte, off int64) error {
	end := (off + int64(len(p)) + page - 1) / page * page
	for at := off / page * page; at < end; {
		data := h.seek(at, unix.SEEK_DATA, end)
		if data == at {
			at = h.seek(at, unix.SEEK_HOLE, end)
			continue
		}
		if err := h.Ask(ctx, at, min(data-at, window)); err != nil {
			return err
		}
		if h.seek(at, unix.SEEK_DATA, end) != at {
			return unix.EIO
		}
	}
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	clear(p)
	if _, err := h.o.content.f.ReadAt(p, off); err != nil && err != io.EOF {
		return fmt.Errorf("read the cache's disk: %w", err)
	}
	return nil
}

// Ask sends a READ, whatever is there, and waits for its end.
func (h *Object) Ask(ctx context.Context, off, n int64) error {
	k := h.k
	k.mu.Lock()
	if h.o.dropped {
		k.mu.Unlock()
		return unix.EIO
	}
	r := k.ask(&request{op: OpRead, o: h.o, off: off, n: n})
	k.mu.Unlock()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		k.mu.Lock()
		defer k.mu.Unlock()
		k.take(r)
		k.ended[r.id] = false // a late answer is not wrong
		return ctx.Err()
	}
}

// seek returns where data or a hole begins, or limit.
func (h *Object) seek(off int64, whence int, limit int64) int64 {
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	at, err := unix.Seek(int(h.o.content.f.Fd()), off, whence)
	if err != nil {
		return limit
	}
	return min(at/page*page, limit)
}

// Close ends this use. The last one's drops the object: what is read of it fails,
// the daemon is told, and the content stays on disk.
func (h *Object) Close() {
	k := h.k
	k.mu.Lock()
	defer k.mu.Unlock()
	o := h.o
	o.refs--
	if o.refs > 0 || o.dropped {
		return
	}
	k.drop(o)
}

// drop withdraws o. The caller holds k.mu.
func (k *Kernel) drop(o *object) {
	if o.opening != nil && o.content == nil && !k.dead {
		return // a mount cannot leave before its OPEN is answered
	}
	o.dropped = true
	if k.live[o.key] == o {
		delete(k.live, o.key)
	}
	rest := k.requests[:0]
	for _, r := range k.requests {
		if r.o == o {
			k.finish(r, unix.EIO)
			k.ended[r.id] = false
			continue
		}
		rest = append(rest, r)
	}
	k.requests = rest
	if o.content != nil {
		k.disk[o.key] = o.content
	}
	k.collect()
	if o.open && o.file != nil && !k.dead {
		k.ask(&request{op: OpClose, object: o.id})
	}
}

// reopen asks for a new file of o, whose file has been closed. The caller holds
// k.mu.
func (k *Kernel) reopen(o *object) {
	if o.opening == nil {
		o.open = false
		o.opening = k.ask(&request{op: OpOpen, o: o})
	}
}

// accept is the end of an OPEN that was answered with a size. The caller holds
// k.mu.
func (k *Kernel) accept(o *object, size int64) {
	if size%page != 0 { // invariant 10; the kernel would round it
		k.t.Errorf("copen of %v with a size of %d, which is not whole pages", o.key, size)
	}
	o.open = true
	if o.content != nil {
		o.content.size = size // a re-OPEN
		return
	}
	o.attach = attachCalls
	o.content = k.disk[o.key]
	if o.content == nil || o.content.size != size {
		o.content = k.newContent(size)
	}
}
