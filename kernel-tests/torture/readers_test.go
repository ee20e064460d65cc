package torture

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/kernel-tests/harness"
)

// An image is one that was made for a test, and what must be read of it.
type image struct {
	boot, blobs string            // paths
	files       map[string][]byte // by path
	bound       string            // its name, if it is one that is bound
}

// newImage makes an image of some megabytes from seed: n small files and a large one.
func newImage(t testing.TB, seed uint64, n int, compressor string) *image {
	t.Helper()
	rnd := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), 1})
	r := rand.New(rnd)
	i := &image{files: map[string][]byte{}}
	for k := range n {
		size := 1 + r.IntN(48<<10)
		if k == 0 {
			size = 2<<20 + 123
		}
		p := make([]byte, size)
		_, _ = rnd.Read(p)               // never fails
		clear(p[size/2 : size/2+size/4]) // something to compress
		i.files[fmt.Sprintf("d%d/f%d", k%7, k)] = p
	}
	dir := t.TempDir()
	src := filepath.Join(dir, "image.tar")
	if err := os.WriteFile(src, archive(t, i.files), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "image")
	if _, err := convert.ConvertToDir(t.Context(), src, out, convert.Options{Compressor: compressor}); err != nil {
		t.Fatal(err)
	}
	i.boot, i.blobs = filepath.Join(out, "image.boot"), filepath.Join(out, "blobs")
	return i
}

func archive(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(files[name])), Mode: 0o644})
		if err == nil {
			_, err = w.Write(files[name])
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What came of a read.
type outcome int

const (
	right outcome = iota
	failed
	wrong
	zeros // wrong ones
)

// A tally counts reads by what came of them.
type tally struct{ reads, wrong, zeros, failed atomic.Int64 }

func (c *tally) add(o outcome) {
	c.reads.Add(1)
	switch o {
	case failed:
		c.failed.Add(1)
	case zeros:
		c.zeros.Add(1)
		fallthrough
	case wrong:
		c.wrong.Add(1)
	}
}

func (c *tally) String() string {
	return fmt.Sprintf("%d reads, %d wrong, %d of these zeros, %d failed", c.reads.Load(), c.wrong.Load(), c.zeros.Load(), c.failed.Load())
}

// total is the tally of all tests, and how many workers died; TestMain prints it.
var total struct {
	tally
	denied atomic.Int64 // reads that failed where that is right, none of which is in tally.failed
	deaths atomic.Int64
}

// A score is what readers got.
type score struct {
	tally
	mayFail bool // nobody has the bytes, so a read that fails is right

	mu    sync.Mutex // guards first
	first string     // that was not right
}

func (s *score) add(o outcome) {
	s.tally.add(o)
	if o == failed && s.mayFail {
		total.reads.Add(1)
		total.denied.Add(1)
		return
	}
	total.add(o)
}

// bad reports whether anything was not right.
func (s *score) bad() bool { return s.wrong.Load() > 0 || s.failed.Load() > 0 }

func (s *score) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first == "" {
		s.first = fmt.Sprintf(format, args...)
	}
}

// readers starts n readers of the image at point, each of which reads every file once, in
// an order and in pieces of its own, and compares every byte. wait waits for them, and
// fails t if anything was not right.
func (s *score) readers(i *image, point string, n int, seed uint64) (wait func(t *testing.T, m *machine)) {
	end := s.start(i, point, n, seed)
	return func(t *testing.T, m *machine) {
		t.Helper()
		end(t, m)
		if s.bad() {
			t.Errorf("%s; the first: %s", s, s.first)
		}
	}
}

// start is readers whose wait only waits.
func (s *score) start(i *image, point string, n int, seed uint64) (wait func(t *testing.T, m *machine)) {
	var all sync.WaitGroup
	for k := range n {
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(k)))
			for _, name := range shuffled(i, r) {
				s.file(filepath.Join(point, name), i.files[name], r)
			}
		})
	}
	return s.waiter(&all)
}

// load starts n readers that read files of the image again and again, past the kernel's
// pages; one file they leave alone, so that the image stays incomplete. end ends them, and
// fails t if anything was not right.
func (s *score) load(i *image, point string, n int, seed uint64) (end func(t *testing.T, m *machine)) {
	stop := s.loop(i, point, n, seed)
	return func(t *testing.T, m *machine) {
		t.Helper()
		stop(t, m)
		if s.bad() {
			t.Errorf("%s; the first: %s", s, s.first)
		}
	}
}

// loop is load whose end only ends.
func (s *score) loop(i *image, point string, n int, seed uint64) (end func(t *testing.T, m *machine)) {
	var all sync.WaitGroup
	stop := make(chan struct{})
	for k := range n {
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(k)))
			for {
				for _, name := range shuffled(i, r) {
					select {
					case <-stop:
						return
					default:
					}
					if name == leftAlone {
						continue
					}
					_ = harness.DropFile(filepath.Join(point, name)) // reads pages if it cannot
					s.file(filepath.Join(point, name), i.files[name], r)
				}
			}
		})
	}
	wait := s.waiter(&all)
	return func(t *testing.T, m *machine) {
		t.Helper()
		close(stop)
		wait(t, m)
	}
}

// leftAlone is a file that load does not read.
const leftAlone = "d0/f0"

func shuffled(i *image, r *rand.Rand) []string {
	names := slices.Sorted(maps.Keys(i.files))
	r.Shuffle(len(names), func(a, b int) { names[a], names[b] = names[b], names[a] })
	return names
}

// waiter returns what waits for all, which must come to an end.
func (s *score) waiter(all *sync.WaitGroup) func(t *testing.T, m *machine) {
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	return func(t *testing.T, m *machine) {
		t.Helper()
		select {
		case <-done:
		case <-time.After(2 * patience):
			t.Fatalf("readers are stuck: %s\n%s", s, m.log.String())
		}
	}
}

// file reads a file in pieces.
func (s *score) file(name string, want []byte, r *rand.Rand) {
	f, err := os.Open(name)
	if err != nil {
		s.add(failed)
		s.note("%v", err)
		return
	}
	defer f.Close()
	for off := 0; off < len(want); {
		n := min(1+r.IntN(128<<10), len(want)-off)
		s.piece(f, int64(off), want[off:off+n])
		off += n
	}
}

func (s *score) piece(f *os.File, off int64, want []byte) {
	got := make([]byte, len(want))
	n, err := f.ReadAt(got, off)
	switch {
	case err != nil && err != io.EOF || n != len(want):
		s.add(failed)
		s.note("%s at %d: %d of %d bytes, %v", f.Name(), off, n, len(want), err)
	case !bytes.Equal(got, want):
		if strings.Trim(string(got), "\x00") == "" {
			s.add(zeros)
		} else {
			s.add(wrong)
		}
		s.note("%s at %d: %d wrong bytes", f.Name(), off, differ(got, want))
	default:
		s.add(right)
	}
}

func differ(a, b []byte) (n int) {
	for i := range a {
		if a[i] != b[i] {
			n++
		}
	}
	return n
}
