package blobmgr

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/opencontainers/go-digest"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// A fixture is a blob made of random chunks: its plain bytes and its stored form.
type fixture struct {
	entry   chunk.Entry
	plain   []byte // as the cache file must hold it
	stored  []byte
	digests []ChunkDigest
	ref     backend.Ref
}

// makeBlob makes a blob with chunks of the given lengths.
func makeBlob(t testing.TB, seed uint64, lens []int) *fixture {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	return makeBlobOf(t, lens, func() byte { return byte(r.Uint32N(16)) }) // compresses to about a half
}

// makeZeros makes a blob whose chunks compress to nothing.
func makeZeros(t testing.TB, lens []int) *fixture {
	t.Helper()
	return makeBlobOf(t, lens, func() byte { return 0 })
}

// makeBlobOf makes a blob of bytes that next gives.
func makeBlobOf(t testing.TB, lens []int, next func() byte) *fixture {
	t.Helper()
	enc, err := chunk.NewEncoder(chunk.CodecZstd, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	x := &fixture{}
	tail := chunk.Tail{Codec: chunk.CodecZstd, Digester: chunk.BLAKE3, ChunkSize: 16 << 20, DataDigest: sha256.New()}
	for i, n := range lens {
		p := make([]byte, n)
		for j := range p {
			p[j] = next()
		}
		out, compressed := enc.Encode(nil, p)
		d := chunk.BLAKE3.Sum(p)
		off := int64(len(x.plain))
		tail.Chunks = append(tail.Chunks, chunk.Chunk{
			Off: off, Len: int64(n), COff: int64(len(x.stored)), CLen: int64(len(out)), Compressed: compressed, Digest: d, Known: true,
		})
		x.digests = append(x.digests, ChunkDigest{Index: i, Off: off, Len: int64(n), Digest: d})
		x.stored = append(x.stored, out...)
		x.plain = append(x.plain, p...)
		x.plain = append(x.plain, make([]byte, -n&4095)...)
	}
	tail.DataLen = int64(len(x.stored))
	tail.DataDigest.Write(x.stored)
	var w bytes.Buffer
	e, err := chunk.WriteTail(&w, tail)
	if err != nil {
		t.Fatal(err)
	}
	x.stored = append(x.stored, w.Bytes()...)
	sum := sha256.Sum256(x.stored)
	e.ID = fmt.Sprintf("%x", sum)
	x.entry = e
	x.ref = backend.Ref{Digest: digest.NewDigestFromEncoded(digest.SHA256, e.ID), Size: int64(len(x.stored))}
	return x
}

// lengths returns n chunk lengths, most of them small files.
func lengths(seed uint64, n int) []int {
	r := rand.New(rand.NewPCG(seed, 2))
	lens := make([]int, n)
	for i := range lens {
		lens[i] = 1 + r.IntN(12<<10)
		if r.IntN(8) == 0 {
			lens[i] = 1 + r.IntN(200<<10)
		}
	}
	return lens
}

func (x *fixture) source(s backend.Store) Source {
	return Source{Entry: x.entry, Store: s, Ref: x.ref, Digests: x.digests}
}

// A request is one read that a store saw.
type request struct{ off, n int64 }

// A store serves one stored blob and remembers what was read. Its link is ideal unless
// rtt and rate are set.
type store struct {
	stored  []byte
	rtt     time.Duration
	rate    float64 // bytes per second; 0: infinite
	mu      sync.Mutex
	log     []request
	opens   int
	live    int
	fault   func(ctx context.Context, p []byte, off int64) error // after the read
	free    time.Time                                            // when the link is idle
	openErr error
}

func (s *store) Open(_ context.Context, ref backend.Ref) (backend.Blob, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opens++
	if s.openErr != nil {
		return nil, s.openErr
	}
	s.live++
	return &storeBlob{s: s}, nil
}

// setFault changes what happens to reads.
func (s *store) setFault(f func(ctx context.Context, p []byte, off int64) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// requests returns and forgets what was read.
func (s *store) requests() (log []request, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	log, s.log = s.log, nil
	for _, r := range log {
		total += r.n
	}
	return log, total
}

type storeBlob struct {
	s    *store
	once sync.Once
}

func (b *storeBlob) Size() int64 { return int64(len(b.s.stored)) }

func (b *storeBlob) Close() error {
	b.once.Do(func() {
		b.s.mu.Lock()
		defer b.s.mu.Unlock()
		b.s.live--
	})
	return nil
}

func (b *storeBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > b.Size() {
		return fs.ErrInvalid
	}
	s := b.s
	s.mu.Lock()
	s.log = append(s.log, request{off, int64(len(p))})
	fault := s.fault
	var wait time.Duration
	if s.rate > 0 {
		now := time.Now()
		if s.free.Before(now) {
			s.free = now
		}
		s.free = s.free.Add(time.Duration(float64(len(p)) / s.rate * 1e9))
		wait = s.free.Sub(now) + s.rtt
	}
	s.mu.Unlock()
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	copy(p, s.stored[off:])
	if fault != nil {
		if err := fault(ctx, p, off); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func newManager(t testing.TB, o Options) *Manager {
	t.Helper()
	if o.Dir == "" {
		o.Dir = filepath.Join(t.TempDir(), "cache")
	}
	m, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func open(t testing.TB, m *Manager, s Source) *Blob {
	t.Helper()
	b, err := m.Open(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func closeBlob(t testing.TB, b *Blob) {
	t.Helper()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// fill fills a range and compares what the kernel would read.
func fill(t testing.TB, b *Blob, x *fixture, off, n int64) {
	t.Helper()
	if err := b.Fill(t.Context(), off, n); err != nil {
		t.Fatal(err)
	}
	check(t, b, x, off, n)
}

func check(t testing.TB, b *Blob, x *fixture, off, n int64) {
	t.Helper()
	if !b.Ready(off, n) {
		t.Fatalf("%d+%d is not ready", off, n)
	}
	n = min(n, int64(len(x.plain))-off)
	p := make([]byte, max(n, 0))
	if _, err := b.File().ReadAt(p, off); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if len(p) > 0 && !bytes.Equal(p, x.plain[off:off+n]) {
		t.Fatalf("wrong bytes in %d+%d", off, n)
	}
}

// files lists what a cache directory has of blobs.
func files(t testing.TB, dir string) (names []string) {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if e.Name() != runningName {
			names = append(names, e.Name())
		}
	}
	return names
}

// quietOptions turn off everything that is not asked for.
func quietOptions() Options { return Options{NoCompletion: true, Readahead: -1} }
