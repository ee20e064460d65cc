package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/backend/registry"
	"github.com/erofsd/erofsd/convert"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

const (
	repo = "e2e/image"
	// seed is what the image is made from.
	seed = 5
)

// A world is the image that all tests read, and the program that they test.
type world struct {
	bin       string // directory of erofsd
	src       string // directory of the tree that the image is made of
	bootstrap string // file
	blobs     string // directory of the one blob
	id        string // of the blob, hex digits
	content   string // of docker-registry, with the blob and the image
	want      testenv.Tree
	cache     []byte // the blob's cache file once it is complete

	seeding sync.Mutex // held while content is made
}

// newWorld makes it, or skips t where erofsd does not run.
func newWorld(t *testing.T) *world {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
	w := &world{
		bin: filepath.Join(dir, "bin"), src: filepath.Join(dir, "src"), bootstrap: filepath.Join(dir, "image", "image.boot"),
		blobs: filepath.Join(dir, "image", "blobs"), content: filepath.Join(dir, "content"),
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", w.bin+"/", "./cmd/erofsd")
	build.Dir = testenv.ModuleRoot(t)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build erofsd: %v\n%s", err, out)
	}
	if err := makeTree(w.src); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.want, err = testenv.ScanTree(w.src, true); err != nil {
		t.Fatal(err)
	}
	if _, err := convert.ConvertToDir(t.Context(), w.src, filepath.Dir(w.bootstrap), convertOptions); err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(w.blobs)
	if err != nil || len(names) != 1 {
		t.Fatalf("want one blob, got %v, %v", names, err)
	}
	w.id = names[0].Name()
	m := w.start(t)
	point := m.mount(t, "localfs", object{"dir": w.blobs})
	w.compare(t, point)
	if w.cache, err = os.ReadFile(m.cacheFiles(t)[0]); err != nil {
		t.Fatal(err)
	}
	m.end(t)
	return w
}

// convertOptions make chunks that are small beside the files.
var convertOptions = convert.Options{ChunkSize: 64 << 10}

// makeTree makes a tree of 130 files, 24 MB in all, which do not compress: 50 programs and
// 80 files of data that fetching one does not bring all of.
func makeTree(dir string) error {
	rnd := rand.NewChaCha8([32]byte{seed})
	write := func(name string, n int) error {
		name = filepath.Join(dir, name)
		p := make([]byte, n)
		_, _ = rnd.Read(p) // never fails
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		return os.WriteFile(name, p, 0o644)
	}
	for i := range 50 {
		if err := write(fmt.Sprintf("usr/bin/program-%02d", i), 20_000+1_777*i); err != nil {
			return err
		}
	}
	for i := range 80 {
		if err := write(fmt.Sprintf("data/%d/file-%02d", i%8, i), 256<<10-1000-13*i); err != nil {
			return err
		}
	}
	return os.Symlink("usr/bin/program-07", filepath.Join(dir, "program"))
}

// files are the regular files below a directory of the image, in an order in which
// neighbours do not follow each other.
func (w *world) files(below string) []string {
	var names []string
	for name, e := range w.want {
		if e.Mode&unix.S_IFMT == unix.S_IFREG && strings.HasPrefix(name, below) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	rand.New(rand.NewPCG(seed, 1)).Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names
}

// seeded is a docker-registry over the content that all share, made with the first.
func (w *world) seeded(t *testing.T, o services.RegistryOptions) *services.Process {
	t.Helper()
	w.seeding.Lock()
	defer w.seeding.Unlock()
	if _, err := os.Stat(w.content); err != nil {
		w.seed(t)
	}
	o.Dir = w.content
	return services.Registry(t, o)
}

// seed pushes the image, and the blob to all repositories that tests want.
func (w *world) seed(t *testing.T) {
	t.Helper()
	p := services.Registry(t, services.RegistryOptions{Dir: w.content})
	defer p.Stop()
	store, err := registry.New(registry.Options{PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	pusher, err := store.Pusher(p.Addr + "/" + repo + ":1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := convert.Convert(t.Context(), w.src, pusher, convertOptions); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(w.blobs, w.id)
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	desc := ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, w.id), Size: st.Size()}
	if err := pusher.Blob(t.Context(), desc, func() (io.ReadCloser, error) { return os.Open(name) }); err != nil {
		t.Fatal(err)
	}
}

// compare reads everything at a mount point, which must be as the tree is.
func (w *world) compare(t *testing.T, point string) {
	t.Helper()
	got, err := testenv.ScanTree(point, true)
	if err != nil {
		t.Errorf("read all: %v", err)
		return
	}
	w.want.Compare(t, got, true)
}

// read reads one file and says how long that took. What it gives must be right; the
// error is the kernel's.
func (w *world) read(point, name string) (time.Duration, error) {
	start := time.Now()
	p, err := os.ReadFile(filepath.Join(point, name))
	took := time.Since(start)
	if err != nil {
		return took, err
	}
	if sum := sha256.Sum256(p); hex.EncodeToString(sum[:]) != w.want[name].SHA256 {
		return took, fmt.Errorf("%s: %w", name, errWrong)
	}
	return took, nil
}

// errWrong is the worst that can happen.
var errWrong = fmt.Errorf("wrong bytes: %w", fs.ErrInvalid)

// A load is some readers that read all files of data, each file once.
type load struct {
	ended  chan struct{} // closed when all have
	read   chan struct{} // one for each file that was read
	cancel context.CancelFunc

	// For others after ended:
	errs    []error
	longest time.Duration // that a read took
}

// load starts readers.
func (w *world) load(t *testing.T, point string) *load {
	t.Helper()
	const readers = 4
	names := w.files("data/")
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{ended: make(chan struct{}), read: make(chan struct{}, len(names)), cancel: cancel}
	next := make(chan string, len(names))
	for _, name := range names {
		next <- name
	}
	close(next)
	type result struct {
		longest time.Duration
		err     error
	}
	results := make(chan result, readers)
	for range readers {
		go func() {
			var r result
			for name := range next {
				if ctx.Err() != nil {
					break
				}
				took, err := w.read(point, name)
				r.longest = max(r.longest, took)
				if err != nil {
					r.err = err
				}
				l.read <- struct{}{}
				time.Sleep(5 * time.Millisecond) // readers do something with what they read
			}
			results <- r
		}()
	}
	go func() {
		defer close(l.ended)
		for range readers {
			r := <-results
			l.longest = max(l.longest, r.longest)
			if r.err != nil {
				l.errs = append(l.errs, r.err)
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-l.ended
	})
	return l
}

// await waits until n more files have been read.
func (l *load) await(t *testing.T, n int) {
	t.Helper()
	deadline := time.After(bound)
	for range n {
		select {
		case <-l.read:
		case <-deadline:
			t.Fatalf("fewer than %d files were read in %v", n, bound)
		}
	}
}

// wait waits for the end: every read succeeded, and took less than most.
func (l *load) wait(t *testing.T, most time.Duration) {
	t.Helper()
	select {
	case <-l.ended:
	case <-time.After(2 * bound):
		t.Fatal("the readers do not end")
	}
	for _, err := range l.errs {
		t.Error(err)
	}
	if l.longest > most {
		t.Errorf("a read took %v, want less than %v", l.longest, most)
	}
	t.Logf("the longest read took %v", l.longest.Round(time.Millisecond))
}
