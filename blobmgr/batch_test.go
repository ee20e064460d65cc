package blobmgr

import (
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/testenv"
)

// batchSource is the blob of nydus's fixture image with batches: units of several
// chunks.
func batchSource(t *testing.T) Source {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "batch")
	f, err := os.Open(filepath.Join(dir, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m, err := erofs.Open(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	e, err := chunk.ParseEntry(m.BlobEntries()[0])
	if err != nil {
		t.Fatal(err)
	}
	s := Source{Entry: e}
	for c, err := range m.Chunks() {
		if err != nil {
			t.Fatal(err)
		}
		s.Digests = append(s.Digests, ChunkDigest{Index: int(c.Index), Off: c.Off, Len: c.Len, Digest: c.Digest})
	}
	slices.SortFunc(s.Digests, func(a, b ChunkDigest) int { return a.Index - b.Index })
	stored, err := os.ReadFile(filepath.Join(dir, "blobs", e.ID))
	if err != nil {
		t.Fatal(err)
	}
	s.Store, s.Ref = &store{stored: stored}, backend.Ref{Size: int64(len(stored))}
	return s
}

// fillAll fills every chunk of s.
func fillAll(t *testing.T, b *Blob, s Source) {
	t.Helper()
	for _, d := range s.Digests {
		if err := b.Fill(t.Context(), d.Off, d.Len); err != nil {
			t.Fatal(err)
		}
	}
}

// verify compares all of b with the digests of s.
func verify(t *testing.T, b *Blob, s Source) {
	t.Helper()
	for _, d := range s.Digests {
		if !b.Ready(d.Off, d.Len) {
			t.Fatalf("chunk %d is not ready", d.Index)
		}
		p := make([]byte, d.Len)
		if _, err := b.File().ReadAt(p, d.Off); err != nil {
			t.Fatal(err)
		}
		if s.Entry.Digester.Sum(p) != d.Digest {
			t.Errorf("chunk %d is wrong", d.Index)
		}
	}
}

// half is s as an image that uses every other chunk sees it.
func half(s Source) Source {
	var ds []ChunkDigest
	for i, d := range s.Digests {
		if i%2 == 0 {
			ds = append(ds, d)
		}
	}
	s.Digests = ds
	return s
}

// A present batch in which another image knows further chunks holds zeros for them:
// it must be fetched again, now and after a restart.
func TestNewDigestsInAPresentUnit(t *testing.T) {
	s := batchSource(t)
	for _, restart := range []bool{false, true} {
		m := newManager(t, quietOptions())
		b := open(t, m, half(s))
		if b.table.Units() == b.table.Len() {
			t.Fatal("no batches in the fixture")
		}
		fillAll(t, b, half(s))
		verify(t, b, half(s))
		if restart {
			closeBlob(t, b)
		}
		all := open(t, m, s)
		if slices.IndexFunc(s.Digests, func(d ChunkDigest) bool { return !all.Ready(d.Off, d.Len) }) < 0 {
			t.Error("ready with chunks that were never verified")
		}
		fillAll(t, all, s)
		verify(t, all, s)
		closeBlob(t, all)
		if !restart {
			closeBlob(t, b)
		}
	}
}

// The same while the unit is being written.
func TestNewDigestsInAFillingUnit(t *testing.T) {
	s := batchSource(t)
	var m *Manager
	var once sync.Once
	batch := int64(-1) // where the first one begins
	o := quietOptions()
	o.wrap = func(f cacheFile) cacheFile {
		return &hookedFile{cacheFile: f, write: func(off int64, _ int) error {
			if off == batch {
				once.Do(func() { open(t, m, s) })
			}
			return nil
		}}
	}
	m = newManager(t, o)
	b := open(t, m, half(s))
	for u := 0; batch < 0; u++ {
		if x := b.table.Unit(u); x.Last-x.First > 1 {
			batch = x.Off
		}
	}
	fillAll(t, b, half(s))
	fillAll(t, b, s)
	verify(t, b, s)
	closeBlob(t, b)
	closeBlob(t, b)
}

// With the kernel's file there is no second look: it reads what has data without asking.
// So who needs other chunks of a batch than that file was filled with gets a file of its
// own, at once or after a restart.
func TestNewDigestsInTheKernelsFile(t *testing.T) {
	s := batchSource(t)
	for _, restart := range []bool{false, true} {
		m := attachedManager(t, "")
		b := open(t, m, half(s))
		fillObject(t, b, half(s))
		if restart {
			closeBlob(t, b)
		}
		all := open(t, m, s)
		if all.ID() == b.ID() {
			t.Fatalf("restart %v: both images have the file that was filled for one", restart)
		}
		fillObject(t, all, s)
		again := open(t, m, half(s)) // needs nothing new of either
		if again.ID() != b.ID() {
			t.Errorf("restart %v: the first image got another file", restart)
		}
		closeBlob(t, again)
		closeBlob(t, all)
		if !restart {
			closeBlob(t, b)
		}
	}
}

// fillObject attaches a new object of the kernel to b, fills what s needs, and compares it.
func fillObject(t *testing.T, b *Blob, s Source) {
	t.Helper()
	o := newObjectFile(t)
	if err := b.Attach(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	fillAll(t, b, s)
	for _, d := range s.Digests {
		p := make([]byte, d.Len)
		if _, err := o.f.ReadAt(p, d.Off); err != nil || s.Entry.Digester.Sum(p) != d.Digest {
			t.Errorf("chunk %d is wrong (%v)", d.Index, err)
		}
	}
	b.Detach(o)
}
