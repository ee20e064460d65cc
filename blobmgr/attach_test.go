package blobmgr

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"testing"
	"time"
	"unsafe"
)

// An objectFile is what the kernel hands over: written in whole pages from aligned
// memory, never read; a real sparse file behind it.
type objectFile struct {
	t *testing.T
	f *os.File
}

func newObjectFile(t *testing.T) *objectFile {
	f, err := os.Create(t.TempDir() + "/object")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &objectFile{t, f}
}

func (o *objectFile) WriteAt(p []byte, off int64) (int, error) {
	if off%pageSize != 0 || len(p)%pageSize != 0 || uintptr(unsafe.Pointer(&p[0]))%pageSize != 0 {
		o.t.Errorf("write of %d bytes at %d from %p: 6.1 would put it elsewhere", len(p), off, p)
	}
	return o.f.WriteAt(p, off)
}

func (o *objectFile) Data(size int64, yield func(off, end int64)) error {
	return sparseFile{o.f}.Data(size, yield)
}

func (o *objectFile) check(x *fixture, off, n int64) {
	o.t.Helper()
	p := make([]byte, n)
	if _, err := o.f.ReadAt(p, off); err != nil || !bytes.Equal(p, x.plain[off:off+n]) {
		o.t.Fatalf("wrong bytes in %d+%d (%v)", off, n, err)
	}
}

func attachedManager(t *testing.T, dir string) *Manager {
	o := quietOptions()
	o.Attached, o.Dir = true, dir
	return newManager(t, o)
}

func TestAttach(t *testing.T) {
	x := makeBlob(t, 1, lengths(1, 60))
	s := &store{stored: x.stored}
	m := attachedManager(t, "")
	b := open(t, m, x.source(s))
	if !b.fresh || b.File() != nil || b.ID() != x.entry.ID {
		t.Fatalf("fresh %v, file %v, id %s", b.fresh, b.File(), b.ID())
	}
	if err := b.Fill(t.Context(), 0, 1); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("fill without a file: %v", err)
	}
	o := newObjectFile(t)
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	half := b.Size() / 2
	if err := b.Fill(t.Context(), 0, half); err != nil {
		t.Fatal(err)
	}
	o.check(x, 0, half)
	have := b.Stats().Present
	b.Detach(o)
	if err := b.Fill(t.Context(), half, b.Size()-half); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("fill after detach: %v", err)
	}

	// The file itself says what is there.
	s.requests()
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if got := b.Stats().Present; got != have || !b.Ready(0, half) {
		t.Fatalf("%d bytes are present after the second attach, want %d", got, have)
	}
	if err := b.Fill(t.Context(), 0, b.Size()); err != nil {
		t.Fatal(err)
	}
	o.check(x, 0, b.Size())
	waitDone(t, b)

	// A daemon that comes later needs no request at all.
	closeBlob(t, b)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	s.requests()
	m = attachedManager(t, m.opt.Dir)
	b = open(t, m, x.source(s))
	if b.fresh {
		t.Error("a blob with a kept table is fresh")
	}
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if !b.Ready(0, b.Size()) || !b.Stats().Complete {
		t.Error("not complete")
	}
	if log, _ := s.requests(); len(log) != 0 {
		t.Errorf("requests %v", log)
	}
	// An empty file in its place: everything is missing again.
	if err := b.Attach(t.Context(), newObjectFile(t)); err != nil {
		t.Fatal(err)
	}
	if st := b.Stats(); st.Complete || st.Present != 0 || b.Ready(0, 1) {
		t.Errorf("stats of an empty file: %+v", st)
	}
	closeBlob(t, b)
}

func waitDone(t *testing.T, b *Blob) {
	t.Helper()
	select {
	case <-b.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the blob does not become complete")
	}
}

// A kernel that closes the file ends the reads that wait for it, and nothing writes
// to it afterwards.
func TestDetachEndsFills(t *testing.T) {
	x := makeBlob(t, 2, lengths(2, 20))
	began := make(chan struct{}, 1)
	s := &store{stored: x.stored}
	b := open(t, attachedManager(t, ""), x.source(s))
	s.setFault(func(ctx context.Context, _ []byte, _ int64) error {
		began <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	o := newObjectFile(t)
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	filled := make(chan error)
	go func() { filled <- b.Fill(t.Context(), 0, 1) }()
	<-began
	b.Detach(newObjectFile(t)) // of another object: nothing happens
	select {
	case err := <-filled:
		t.Fatal("fill ended too early:", err)
	case <-time.After(20 * time.Millisecond):
	}
	b.Detach(o)
	if err := <-filled; !errors.Is(err, os.ErrClosed) {
		t.Fatalf("waiter got %v", err)
	}
	s.setFault(nil)
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if err := b.Fill(t.Context(), 0, 1); err != nil {
		t.Fatal(err)
	}
	closeBlob(t, b)
}

// Domains share nothing, images of one domain share the blob.
func TestDomains(t *testing.T) {
	x := makeBlob(t, 3, lengths(3, 5))
	m := attachedManager(t, "")
	src := func(domain string) Source {
		s := x.source(&store{stored: x.stored})
		s.Domain = domain
		return s
	}
	a, again, b := open(t, m, src("a")), open(t, m, src("a")), open(t, m, src("b"))
	if a != again || a == b || a.ID() != b.ID() {
		t.Errorf("blobs %p %p of a, %p of b; ids %s %s", a, again, b, a.ID(), b.ID())
	}
	forged := src("a")
	forged.Digests = slices.Clone(forged.Digests)
	forged.Digests[0].Digest[0] ^= 1
	f := open(t, m, forged)
	if f == a || f.ID() == a.ID() {
		t.Errorf("a forged image got blob %s", f.ID())
	}
	for _, b := range []*Blob{a, again, b, f} {
		closeBlob(t, b)
	}
}
