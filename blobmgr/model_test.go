package blobmgr

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/chunk"
)

// TestModel does random things to a blob from several goroutines, with a store that
// lies and a disk that fills up, and compares every range that it was promised with
// the plain bytes.
func TestModel(t *testing.T) {
	for i := range 12 {
		seed := uint64(time.Now().UnixNano()) + uint64(i)
		runModel(t, seed)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

type model struct {
	t     *testing.T
	x     *fixture
	dir   string
	lying atomic.Bool // the store
	full  atomic.Bool // the disk
}

func runModel(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 3))
	m := &model{t: t, x: makeBlob(t, seed, lengths(seed, 20+r.IntN(60))), dir: filepath.Join(t.TempDir(), "cache")}
	for range 6 {
		m.session(r)
	}
}

// session opens the blob, works on it and closes it, or crashes.
func (m *model) session(r *rand.Rand) {
	t := m.t
	faults := rand.New(rand.NewPCG(r.Uint64(), 4))
	var mu sync.Mutex
	chance := func(n int) bool {
		mu.Lock()
		defer mu.Unlock()
		return faults.IntN(n) == 0
	}
	s := &store{stored: m.x.stored}
	s.setFault(func(_ context.Context, p []byte, _ int64) error {
		switch {
		case !m.lying.Load() || chance(3):
			return nil
		case chance(2):
			return errors.New("the network is down")
		}
		p[len(p)/2] ^= 0x10
		return nil
	})
	o := Options{
		Dir: m.dir, NoCompletion: r.IntN(2) == 0, CompletionDelay: time.Millisecond, MemoryLimit: minMemory,
		wrap: func(f cacheFile) cacheFile {
			return &hookedFile{cacheFile: f, write: func(int64, int) error {
				if m.full.Load() && chance(3) {
					return syscall.ENOSPC
				}
				return nil
			}}
		},
	}
	m.lying.Store(false)
	mgr := newManager(t, o)
	src := m.x.source(s)
	if r.IntN(2) == 0 { // an image that uses some of the chunks
		src.Digests = slices.DeleteFunc(slices.Clone(src.Digests), func(d ChunkDigest) bool { return d.Index > 0 && r.IntN(3) == 0 })
	}
	b := open(t, mgr, src)
	forged := src // about a chunk that the first image has, too: else nobody can tell
	forged.Digests = slices.Clone(m.x.digests)
	forged.Digests[src.Digests[r.IntN(len(src.Digests))].Index].Digest[5] ^= 4
	m.lying.Store(r.IntN(2) == 0)
	m.full.Store(r.IntN(3) == 0)
	var wg sync.WaitGroup
	for range 8 {
		mine := rand.New(rand.NewPCG(r.Uint64(), 5))
		wg.Go(func() { m.reader(b, mine) })
	}
	if r.IntN(2) == 0 { // and another that uses all
		m.lying.Store(false)
		again := open(t, mgr, m.x.source(s))
		if again != b {
			t.Error("not shared")
		}
		defer closeBlob(t, again)
	}
	if r.IntN(2) == 0 {
		m.lying.Store(false)
		bad := open(t, mgr, forged)
		if bad == b {
			t.Error("shared with a forged image")
		}
		defer closeBlob(t, bad)
	}
	wg.Wait()
	m.checkPresent(b)
	var saved map[string][]byte
	if r.IntN(2) == 0 {
		saved = m.save()
	}
	closeBlob(t, b)
	if err := mgr.Close(); err != nil {
		t.Error(err)
	}
	if saved != nil {
		m.crash(r, saved)
	}
}

func (m *model) reader(b *Blob, r *rand.Rand) {
	for range 30 {
		off := r.Int64N(b.Size())
		n := r.Int64N(1 + b.Size()/(1+r.Int64N(40)))
		ctx, cancel := context.WithCancel(m.t.Context())
		if r.IntN(4) == 0 {
			time.AfterFunc(time.Duration(r.IntN(300))*time.Microsecond, cancel)
		}
		err := b.Fill(ctx, off, n)
		cancel()
		if err == nil {
			m.same(b, off, min(n, b.Size()-off))
		}
	}
}

// same compares a range with the plain bytes.
func (m *model) same(b *Blob, off, n int64) {
	p := make([]byte, n)
	if _, err := b.File().ReadAt(p, off); err != nil {
		m.t.Error(err)
	}
	if !slices.Equal(p, m.x.plain[off:off+n]) {
		m.t.Errorf("wrong bytes in %d+%d", off, n)
	}
}

func (m *model) checkPresent(b *Blob) {
	for u := range b.table.Units() {
		if b.present.has(u) {
			x := b.table.Unit(u)
			m.same(b, x.Off, x.Len)
		}
	}
}

// save copies the small files of the cache, as a crash would leave them.
func (m *model) save() map[string][]byte {
	saved := make(map[string][]byte)
	for _, name := range files(m.t, m.dir) {
		if filepath.Ext(name) == "" {
			continue
		}
		if p, err := os.ReadFile(filepath.Join(m.dir, name)); err == nil {
			saved[name] = p
		}
	}
	return saved
}

// crash undoes what closing wrote, and tears units that no clean mark lists.
func (m *model) crash(r *rand.Rand, saved map[string][]byte) {
	for _, name := range files(m.t, m.dir) {
		if filepath.Ext(name) != "" {
			os.Remove(filepath.Join(m.dir, name))
		}
	}
	for name, p := range saved {
		if err := os.WriteFile(filepath.Join(m.dir, name), p, 0o600); err != nil {
			m.t.Error(err)
		}
	}
	name := filepath.Join(m.dir, m.x.entry.ID)
	_, table, err := parseMeta(saved[m.x.entry.ID+metaSuffix])
	if err != nil {
		m.t.Errorf("chunk table after a crash: %v", err)
		return
	}
	clean, _ := parseClean(saved[m.x.entry.ID+cleanSuffix], metaSum(saved[m.x.entry.ID+metaSuffix]), table.Units())
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		m.t.Error(err)
		return
	}
	defer f.Close()
	for range 5 {
		if u := r.IntN(table.Units()); !clean.has(u) {
			f.WriteAt(make([]byte, 100), table.Unit(u).Off)
		}
	}
}

// TestModelIsStrict shows that the model's check can fail.
func TestModelIsStrict(t *testing.T) {
	x := makeBlob(t, 40, []int{8192})
	b := open(t, newManager(t, quietOptions()), x.source(&store{stored: x.stored}))
	defer closeBlob(t, b)
	fill(t, b, x, 0, 8192)
	if chunk.BLAKE3.Sum(x.plain[:8192]) != x.digests[0].Digest {
		t.Error("the plain bytes are not what the digests are of")
	}
	if _, err := b.File().WriteAt([]byte{x.plain[9] + 1}, 9); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	b.File().ReadAt(p, 0)
	if slices.Equal(p, x.plain[:10]) {
		t.Error("a changed byte is not seen")
	}
}
