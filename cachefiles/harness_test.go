package cachefiles_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
)

const page = 4096

// patience is for what must happen; nothing waits that long when all is well.
const patience = time.Minute

// A blob is an Object with known bytes.
type blob struct {
	key  Key
	data []byte

	opened func(ctx context.Context, f *File) error           // nil: takes f
	fill   func(ctx context.Context, off, n int64) error      // nil: writes the range
	close  func() error                                       // nil: nothing
	open   func(ctx context.Context, b *blob) (Object, error) // nil: accepts
	size   func() int64

	file   atomic.Pointer[File]
	opens  atomic.Int64
	fills  atomic.Int64
	active atomic.Int64 // Fills running now
	closes atomic.Int64
}

func newBlob(key Key, n int) *blob {
	b := &blob{key: key, data: make([]byte, n)}
	rng := rand.NewChaCha8([32]byte([]byte("the bytes of a blob, by its size")))
	_, _ = rng.Read(b.data)
	return b
}

func (b *blob) Size() int64 {
	if b.size != nil {
		return b.size()
	}
	return int64(len(b.data))
}

func (b *blob) Opened(ctx context.Context, f *File) error {
	b.file.Store(f)
	if b.opened != nil {
		return b.opened(ctx, f)
	}
	return nil
}

func (b *blob) Fill(ctx context.Context, off, n int64) error {
	b.fills.Add(1)
	b.active.Add(1)
	defer b.active.Add(-1)
	if b.fill != nil {
		return b.fill(ctx, off, n)
	}
	return b.write(off, n)
}

// write makes a range present, rounded outward to pages and padded with zeros.
func (b *blob) write(off, n int64) error { return b.writeTo(b.file.Load(), off, n) }

func (b *blob) writeTo(f *File, off, n int64) error {
	n = (off%page + n + page - 1) / page * page
	off = off / page * page
	p, free, err := AlignedBuffer(int(n))
	if err != nil {
		return err
	}
	defer free()
	if off < int64(len(b.data)) {
		copy(p, b.data[off:])
	}
	_, err = f.WriteAt(p[:n], off)
	return err
}

func (b *blob) Close() error {
	b.closes.Add(1)
	if b.close != nil {
		return b.close()
	}
	return nil
}

// blobs is a Handler of blobs.
type blobs struct {
	mu   sync.Mutex // guards list
	list map[Key]*blob
}

func handle(list ...*blob) *blobs {
	h := &blobs{list: make(map[Key]*blob)}
	for _, b := range list {
		h.list[b.key] = b
	}
	return h
}

func (h *blobs) Open(ctx context.Context, k Key) (Object, error) {
	h.mu.Lock()
	b := h.list[k]
	h.mu.Unlock()
	if b == nil {
		return nil, syscall.ENOENT
	}
	b.opens.Add(1)
	if b.open != nil {
		return b.open(ctx, b)
	}
	return b, nil
}

// A daemon is a server that runs.
type daemon struct {
	*Server
	t    testing.TB
	end  context.CancelFunc
	done chan error
	log  *safeBuffer
}

func start(t testing.TB, d *Device, h Handler, o Options) *daemon {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s := &daemon{t: t, end: cancel, done: make(chan error, 1), log: &safeBuffer{}}
	o.Logger = slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if o.Grace == 0 {
		o.Grace = 100 * time.Millisecond
	}
	s.Server = NewServer(d, h, o)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.done <- s.Serve(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", s.log)
		}
	})
	return s
}

// stop ends Serve and returns its error.
func (s *daemon) stop() error {
	s.t.Helper()
	s.end()
	return s.wait()
}

func (s *daemon) wait() error {
	s.t.Helper()
	select {
	case err := <-s.done:
		if live := s.Stats(); live.InFlight != 0 || live.Objects != 0 || live.Reads != live.Filled+live.Failed+live.Dropped {
			s.t.Errorf("after Serve: %+v", live)
		}
		return err
	case <-time.After(patience):
		s.t.Fatal("Serve does not end")
		return nil
	}
}

type safeBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// until waits for something that another goroutine brings about.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func open(t testing.TB, k *cachefilestest.Kernel, key Key) *cachefilestest.Object {
	t.Helper()
	o, err := k.Open(t.Context(), key)
	if err != nil {
		t.Fatalf("open %v: %v", key, err)
	}
	return o
}

// check reads n bytes of b at off and compares them.
func check(t testing.TB, o *cachefilestest.Object, b *blob, off, n int) {
	t.Helper()
	p := make([]byte, n)
	if err := o.ReadAt(t.Context(), p, int64(off)); err != nil {
		t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	if !bytes.Equal(p, b.data[off:off+n]) {
		t.Fatalf("%d bytes at %d are not the blob's", n, off)
	}
}

// fails reads and wants the error.
func fails(t testing.TB, o *cachefilestest.Object, off, n int, want error) {
	t.Helper()
	if err := o.ReadAt(t.Context(), make([]byte, n), int64(off)); !errors.Is(err, want) {
		t.Fatalf("read %d bytes at %d: %v, want %v", n, off, err, want)
	}
}

// later runs do and gives what it returns.
func later(do func() error) <-chan error {
	c := make(chan error, 1)
	go func() { c <- do() }()
	return c
}

func get(t testing.TB, c <-chan error) error {
	t.Helper()
	select {
	case err := <-c:
		return err
	case <-time.After(patience):
		t.Fatal("nothing comes back")
		return nil
	}
}

var img = Key{Volume: "erofs,dom", Cookie: "blob"}
