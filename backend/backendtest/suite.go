package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
)

// NewStore makes a store that holds blobs and returns how to open each, with its
// size. It registers what must be cleaned up.
type NewStore func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref)

// Run checks that stores made by newStore keep the contract of [backend.Store].
func Run(t *testing.T, newStore NewStore) {
	data := Bytes(300_000, 1)
	// with runs f with a store and the reference of data in it.
	with := func(name string, f func(t *testing.T, s backend.Store, ref backend.Ref)) {
		t.Run(name, func(t *testing.T) {
			s, refs := newStore(t, data, Bytes(10, 2))
			f(t, s, refs[0])
		})
	}
	with("whole", func(t *testing.T, s backend.Store, ref backend.Ref) {
		for _, size := range []int64{ref.Size, 0} {
			ref.Size = size
			b := open(t, s, ref)
			if b.Size() != int64(len(data)) {
				t.Fatalf("size %d, want %d (reference says %d)", b.Size(), len(data), size)
			}
			expect(t, b, data, 0, len(data))
		}
	})
	with("ranges", func(t *testing.T, s backend.Store, ref backend.Ref) {
		b := open(t, s, ref)
		for _, off := range []int{0, 1, 4095, 4096, len(data) / 2, len(data) - 1} {
			for _, n := range []int{1, 2, 4096, 65537} {
				expect(t, b, data, off, min(n, len(data)-off))
			}
		}
	})
	with("zero length", func(t *testing.T, s backend.Store, ref backend.Ref) {
		b := open(t, s, ref)
		for _, off := range []int{0, 7, len(data)} {
			expect(t, b, data, off, 0)
		}
	})
	with("outside", func(t *testing.T, s backend.Store, ref backend.Ref) {
		b := open(t, s, ref)
		for _, r := range [][2]int64{{ref.Size, 1}, {ref.Size - 1, 2}, {-1, 1}, {-1, 0}, {ref.Size + 1, 0}, {1<<63 - 1, 4096}} {
			if err := b.ReadAt(t.Context(), make([]byte, r[1]), r[0]); err == nil || backend.Temporary(err) {
				t.Errorf("%d bytes at %d: error %v, want a permanent one", r[1], r[0], err)
			}
		}
		expect(t, b, data, 0, 10)
	})
	with("parallel", func(t *testing.T, s backend.Store, ref backend.Ref) { parallel(t, open(t, s, ref), data) })
	with("cancelled", func(t *testing.T, s backend.Store, ref backend.Ref) {
		b := open(t, s, ref)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := b.ReadAt(ctx, make([]byte, 10), 0); !errors.Is(err, context.Canceled) {
			t.Errorf("read: error %v, want context.Canceled", err)
		}
		if _, err := s.Open(ctx, ref); !errors.Is(err, context.Canceled) {
			t.Errorf("open: error %v, want context.Canceled", err)
		}
		expect(t, b, data, 0, 10)
	})
	with("missing", func(t *testing.T, s backend.Store, ref backend.Ref) {
		ref.Digest = digest.FromString("another blob")
		for _, size := range []int64{ref.Size, 0} {
			ref.Size = size
			if err := firstRead(t, s, ref); !errors.Is(err, fs.ErrNotExist) || backend.Temporary(err) {
				t.Errorf("error %v, want a permanent fs.ErrNotExist (reference says %d bytes)", err, size)
			}
		}
	})
	with("malformed digest", func(t *testing.T, s backend.Store, ref backend.Ref) {
		for _, d := range []digest.Digest{"", "sha256:", "sha256:../../etc/passwd", digest.Digest("sha256:../" + ref.Digest.Encoded()), "md5:00"} {
			ref.Digest = d
			if err := firstRead(t, s, ref); err == nil || backend.Temporary(err) {
				t.Errorf("digest %q: error %v, want a permanent one", d, err)
			}
		}
	})
	with("wrong size", func(t *testing.T, s backend.Store, ref backend.Ref) {
		for _, d := range []int64{-1, 1} {
			wrong := ref
			wrong.Size += d
			if err := firstRead(t, s, wrong); err == nil || backend.Temporary(err) {
				t.Errorf("size wrong by %d: error %v, want a permanent one", d, err)
			}
		}
	})
	with("closed", func(t *testing.T, s backend.Store, ref backend.Ref) {
		b, err := s.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		other := open(t, s, ref)
		for range 2 {
			if err := b.Close(); err != nil {
				t.Fatalf("close: %v", err)
			}
		}
		if err := b.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("error %v, want os.ErrClosed", err)
		}
		expect(t, other, data, 5, 5)
	})
	t.Run("empty", func(t *testing.T) {
		s, refs := newStore(t, nil)
		b := open(t, s, refs[0])
		if b.Size() != 0 {
			t.Fatalf("size %d, want 0", b.Size())
		}
		expect(t, b, nil, 0, 0)
	})
	t.Run("goroutines", func(t *testing.T) { leaks(t, newStore, data) })
}

// Bytes returns n bytes that look random and are the same for the same seed.
func Bytes(n int, seed uint64) []byte {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	p := make([]byte, n)
	rand.NewChaCha8(key).Read(p)
	return p
}

func open(t *testing.T, s backend.Store, ref backend.Ref) backend.Blob {
	t.Helper()
	b, err := s.Open(t.Context(), ref)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// firstRead returns the error of opening a blob and reading all of it: a store
// may put off what Open has to report.
func firstRead(t *testing.T, s backend.Store, ref backend.Ref) error {
	t.Helper()
	b, err := s.Open(t.Context(), ref)
	if err != nil {
		return err
	}
	defer b.Close()
	return b.ReadAt(t.Context(), make([]byte, b.Size()), 0)
}

func expect(t *testing.T, b backend.Blob, data []byte, off, n int) {
	t.Helper()
	p := make([]byte, n+2)
	p[0], p[n+1] = 0xa5, 0xa5
	if err := b.ReadAt(t.Context(), p[1:n+1:n+1], int64(off)); err != nil {
		t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	if !bytes.Equal(p[1:n+1], data[off:off+n]) {
		t.Fatalf("read %d bytes at %d: wrong bytes", n, off)
	}
	if p[0] != 0xa5 || p[n+1] != 0xa5 {
		t.Fatalf("read %d bytes at %d: wrote outside of the buffer", n, off)
	}
}

func parallel(t *testing.T, b backend.Blob, data []byte) {
	var wg sync.WaitGroup
	errs := make(chan error, 32)
	for i := range cap(errs) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 0))
			for range 8 {
				off := r.IntN(len(data))
				p := make([]byte, 1+r.IntN(len(data)-off))
				if err := b.ReadAt(t.Context(), p, int64(off)); err != nil {
					errs <- err
					return
				}
				if !bytes.Equal(p, data[off:off+len(p)]) {
					errs <- fmt.Errorf("wrong bytes: %d at %d", len(p), off)
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

// leaks uses a store, cancels some of its reads and looks for goroutines that are
// left when it is gone.
func leaks(t *testing.T, newStore NewStore, data []byte) {
	before := runtime.NumGoroutine()
	t.Run("use", func(t *testing.T) {
		s, refs := newStore(t, data)
		b := open(t, s, refs[0])
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*100*time.Microsecond)
				defer cancel()
				p := make([]byte, len(data))
				if err := b.ReadAt(ctx, p, 0); err == nil && !slices.Equal(p, data) {
					t.Error("a read that was to be cancelled succeeded with wrong bytes")
				}
			})
		}
		wg.Wait()
		expect(t, b, data, 0, len(data))
	})
	for deadline := time.Now().Add(3 * time.Second); runtime.NumGoroutine() > before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, 64<<10)
			t.Fatalf("%d goroutines, %d before the test:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}
