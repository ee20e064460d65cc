package systemd

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
)

// An image is one that was made for a test, and what must be read of it.
type image struct {
	name  string
	files map[string][]byte
}

// newImage makes an image of n files in the machine.
func (m *machine) newImage(name string, n int, seed uint64) *image {
	m.t.Helper()
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	i := &image{name: name, files: map[string][]byte{}}
	for k := range n {
		p := make([]byte, 1+rand.New(random).IntN(256<<10))
		_, _ = random.Read(p) // never fails
		i.files[fmt.Sprintf("f%d", k)] = p
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(i.files)) {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(i.files[name])), Mode: 0o644})
		if err == nil {
			_, err = w.Write(i.files[name])
		}
		if err != nil {
			m.t.Fatal(err)
		}
	}
	src := filepath.Join(m.t.TempDir(), "image.tar")
	err := errors.Join(w.Close(), os.WriteFile(src, b.Bytes(), 0o600))
	if err == nil {
		_, err = convert.ConvertToDir(m.t.Context(), src, filepath.Join(m.dir, "images", name), convert.Options{Compressor: "zstd"})
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return i
}

// mount mounts i and returns where that is to be read.
func (m *machine) mount(i *image) string {
	m.t.Helper()
	point, err := m.tryMount(i)
	if err != nil {
		m.t.Fatal(err)
	}
	return point
}

func (m *machine) tryMount(i *image) (string, error) {
	point := "/mnt/" + i.name
	if err := os.MkdirAll(m.path(point), 0o755); err != nil {
		return "", err
	}
	_, err := m.Mount(context.Background(), api.MountRequest{
		Mountpoint: point, Bootstrap: "/images/" + i.name + "/image.boot", BlobDir: "/images/" + i.name + "/blobs",
	})
	return m.path(point), err
}

// A score is what readers got.
type score struct {
	reads, wrong, failed atomic.Int64

	mu    sync.Mutex // guards first
	first string     // that was not right
}

func (s *score) String() string {
	return fmt.Sprintf("%d reads, %d wrong, %d failed; the first that was not right: %s", s.reads.Load(), s.wrong.Load(), s.failed.Load(), s.first)
}

// file reads a file of i at point, which must be right.
func (s *score) file(i *image, point, name string) {
	path := filepath.Join(point, name)
	_ = harness.DropFile(path) // reads pages if it cannot
	got, err := os.ReadFile(path)
	s.reads.Add(1)
	switch {
	case err != nil:
		s.failed.Add(1)
		s.note(err.Error())
	case !bytes.Equal(got, i.files[name]):
		s.wrong.Add(1)
		s.note(fmt.Sprintf("%s: wrong bytes, zeros: %v", path, len(bytes.Trim(got, "\x00")) == 0))
	}
}

func (s *score) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first == "" {
		s.first = what
	}
}

// leftAlone is a file that load does not read, so that the image stays incomplete.
const leftAlone = "f0"

// load has n readers read files of i at point in orders of their own, again and again.
// end ends them, and fails the test if anything was not right.
func (m *machine) load(i *image, point string, n int, seed uint64) (end func()) {
	m.t.Helper()
	s := &score{}
	var all sync.WaitGroup
	stop := make(chan struct{})
	for k := range n {
		all.Go(func() {
			names := slices.Sorted(maps.Keys(i.files))
			r := rand.New(rand.NewPCG(seed, uint64(k)))
			for {
				r.Shuffle(len(names), func(a, b int) { names[a], names[b] = names[b], names[a] })
				for _, name := range names {
					select {
					case <-stop:
						return
					default:
					}
					if name != leftAlone {
						s.file(i, point, name)
					}
				}
			}
		})
	}
	return func() {
		m.t.Helper()
		close(stop)
		done := make(chan struct{})
		go func() {
			all.Wait()
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(patience):
			m.t.Fatalf("readers are stuck: %s", s)
		}
		if s.wrong.Load()+s.failed.Load() > 0 {
			m.t.Error(s)
		}
		m.t.Log(s)
	}
}

// all reads every file of i once.
func (m *machine) all(i *image, point string) {
	m.t.Helper()
	s := &score{}
	for _, name := range slices.Sorted(maps.Keys(i.files)) {
		s.file(i, point, name)
	}
	if s.wrong.Load()+s.failed.Load() > 0 {
		m.t.Error(s)
	}
}

// newSeed returns a seed, that of $SEED if there is one.
func newSeed(t *testing.T) (seed uint64) {
	t.Helper()
	seed = rand.Uint64()
	if text := os.Getenv("SEED"); text != "" {
		if _, err := fmt.Sscan(text, &seed); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SEED=%d", seed)
	return seed
}
