package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/erofsd/erofsd/cachefiles"
)

// Open finds the object of a key. After a restart every key is accepted: refusing it
// would make a reader that waits for it ask for ever. Its reads fail.
func (t *cachefilesTransport) Open(_ context.Context, k cachefiles.Key) (cachefiles.Object, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := &kernelObject{t: t, key: k}
	bound := t.bound[k]
	switch s := t.objects[k]; {
	case s != nil:
		o.size = s.Size()
	case len(bound) > 0:
		o.size = bound[0].sizeOf(k.Cookie)
	case t.inherited:
		if st, err := os.Lstat(filepath.Join(t.device.Dir(), k.Path())); err == nil {
			o.size = st.Size()
		} // else nobody knows it: the kernel will throw its file away
	default:
		return nil, fmt.Errorf("no mounted image has %s in %s: %w", k.Cookie, k.Volume, syscall.ENOENT)
	}
	t.open[k]++
	for _, b := range bound {
		if b.key.id == k.Cookie { // it is being mounted: its blobs come next
			t.d.background.Go(func() { t.prepare(b) })
		}
	}
	return o, nil
}

// prepare opens the image of b. If that does not succeed, reads try it again.
func (t *cachefilesTransport) prepare(b *binding) {
	ctx, cancel := context.WithTimeout(t.d.ctx, t.d.o.FillTimeout)
	defer cancel()
	if err := t.d.openBinding(ctx, b); err != nil && t.d.ctx.Err() == nil && b.ctx.Err() == nil {
		t.d.log.Warn("a bound image cannot be opened yet; its reads will try it again", "image", b.key.id, "err", err)
	}
}

// A kernelObject is one opening of a key by the kernel. What is behind the key may
// change meanwhile: the image may be closed and opened again, while the kernel
// keeps its object.
type kernelObject struct {
	t    *cachefilesTransport
	key  cachefiles.Key
	size int64
	file *cachefiles.File // set by Opened
}

func (o *kernelObject) Size() int64 { return o.size }

func (o *kernelObject) Opened(ctx context.Context, f *cachefiles.File) error {
	o.file = f
	o.t.mu.Lock()
	o.t.files[o.key] = f
	s := o.t.objects[o.key]
	o.t.mu.Unlock()
	if s == nil {
		return nil
	}
	// It is not final if that fails: the kernel may need long to attach the file, and has
	// when it sends a READ.
	if err := s.attach(ctx, f); err != nil && !errors.Is(err, cachefiles.ErrWithdrawn) {
		o.t.d.log.Warn("cannot look into a file of the kernel's cache yet; its reads will try it again", "blob", o.key.Cookie, "err", err)
	}
	return nil
}

// behind returns what is behind k now, nil if nothing is.
func (t *cachefilesTransport) behind(k cachefiles.Key) served {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.objects[k]
}

// find returns what is behind k, having opened the bound images that have it and are
// mounted. With an error it may be nil, or lack what one of these images knows.
func (t *cachefilesTransport) find(ctx context.Context, k cachefiles.Key) (served, error) {
	var wait []*binding
	t.mu.Lock()
	s := t.objects[k]
	for _, b := range t.bound[k] {
		switch {
		case b.key.id == k.Cookie:
			if s == nil {
				s = b.boot
			}
		case !b.opened.Load() && (t.inherited || t.open[b.key.object(b.key.id)] > 0):
			wait = append(wait, b)
		}
	}
	t.mu.Unlock()
	var errs []error
	for _, b := range wait {
		if err := t.d.openBinding(ctx, b); err != nil {
			errs = append(errs, fmt.Errorf("open image %s: %w", b.key.id, err))
		}
	}
	if len(wait) > 0 {
		s = t.behind(k)
	}
	if s == nil && len(errs) == 0 {
		errs = append(errs, fmt.Errorf("no mounted image has %s in %s", k.Cookie, k.Volume))
	}
	return s, errors.Join(errs...)
}

func (o *kernelObject) Fill(ctx context.Context, off, n int64) error {
	s, ferr := o.t.find(ctx, o.key)
	if s == nil {
		return ferr
	}
	if err := o.fill(ctx, s, off, n); err != nil {
		return errors.Join(err, ferr)
	}
	return nil
}

func (o *kernelObject) fill(ctx context.Context, s served, off, n int64) error {
	if v, ok := s.(*device); ok {
		v.events.Add(1)
	}
	if err := s.attach(ctx, o.file); err != nil {
		return err
	}
	return s.Fill(ctx, off, n)
}

func (o *kernelObject) Close() error {
	t := o.t
	t.mu.Lock()
	if t.files[o.key] == o.file {
		delete(t.files, o.key) // nobody attaches it any more
	}
	behind := []served{t.objects[o.key]}
	bound := slices.Clone(t.bound[o.key])
	t.mu.Unlock()
	for _, b := range bound {
		if b.key.id == o.key.Cookie {
			behind = append(behind, b.boot)
		}
	}
	for _, s := range behind {
		if s != nil && o.file != nil {
			s.detach(o.file)
		}
	}
	t.mu.Lock()
	if t.open[o.key]--; t.open[o.key] == 0 {
		delete(t.open, o.key)
	}
	t.mu.Unlock()
	for _, b := range bound {
		t.d.background.Go(func() { t.d.leave(b) })
	}
	return nil
}
