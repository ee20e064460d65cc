package erofs

import (
	"bytes"
	"slices"
	"testing"
)

// soundness fails when an image that Check accepts cannot be read to its end.
func soundness(t *testing.T, img []byte) {
	t.Helper()
	_, err := checkImage(img, Limits{})
	if _, derr := describe(img); err == nil && derr != nil {
		t.Errorf("accepted: %v", derr)
	}
	if sum, derr := checkImage(img, Limits{Defects: 50}); derr != nil || (err == nil) != (len(sum.Defects) == 0) {
		t.Errorf("%v, but with a list %v, %q", err, derr, sum.Defects)
	}
}

// FuzzSuperblock puts the first bytes of an image before the rest of another.
func FuzzSuperblock(f *testing.F) {
	const head = superOffset + 1024
	img := small().write(f)
	f.Add(img[superOffset:head])
	for _, name := range []string{"zstd", "layered", "zran"} {
		f.Add(fixtureImage(f, name)[superOffset:head])
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		img := bytes.Clone(img)
		copy(img[superOffset:head], p)
		soundness(t, img)
	})
}

// FuzzInode reads inode and what follows it from arbitrary bytes.
func FuzzInode(f *testing.F) {
	img := small().write(f)
	m := openImage(f, img)
	var root Inode
	err := m.Walk(func(path string, n Inode) error {
		if path == "." {
			root = n
		}
		f.Add(img[n.off:min(n.off+512, int64(len(img)))])
		return nil
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		img := bytes.Clone(img)
		copy(img[root.off:], p)
		soundness(t, img)
		m := openImage(t, img)
		n, err := m.Inode(root.NID)
		if err != nil {
			return
		}
		_, _ = m.Xattrs(n)
		_, _ = m.Readlink(n)
		end := int64(0)
		for e, err := range m.Extents(n) {
			if err != nil {
				return
			}
			if e.FileOff != end || e.Len <= 0 || e.Device > len(m.devices) || e.Off < 0 {
				t.Fatalf("%+v after %d bytes", e, end)
			}
			end += e.Len
		}
		if n.IsRegular() && end != n.Size {
			t.Errorf("extents for %d bytes of %d", end, n.Size)
		}
	})
}

func FuzzDirent(f *testing.F) {
	for _, name := range []string{"zstd", "layered"} {
		m := openImage(f, fixtureImage(f, name))
		err := m.Walk(func(_ string, n Inode) error {
			if !n.IsDir() || n.NID%7 != 0 {
				return nil
			}
			p, err := m.flatBlock(n, 0)
			f.Add(p)
			return err
		})
		if err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		count, size := 0, 0
		_, _ = readDirBlock(p, func(e Dirent, err error) bool {
			count, size = count+1, size+direntSize+len(e.Name)
			if err != nil || e.Name == "" || len(e.Name) > maxName || bytes.ContainsAny([]byte(e.Name), "/\x00") {
				t.Errorf("entry %q, %v", e.Name, err)
			}
			return true
		})
		if size > len(p) {
			t.Errorf("%d entries of %d bytes in %d", count, size, len(p))
		}
	})
}

func FuzzXattr(f *testing.F) {
	for _, name := range []string{"zstd", "layered"} {
		m := openImage(f, fixtureImage(f, name))
		err := m.Walk(func(_ string, n Inode) error {
			if n.xattrLen > 0 {
				p, err := m.pages.read(n.off+n.headLen+xattrHeaderSize, n.xattrLen-xattrHeaderSize)
				f.Add(p)
				return err
			}
			return nil
		})
		if err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		for len(p) > 0 {
			x, size, err := parseXattr(p)
			if err != nil {
				return
			}
			if _, rest, err := splitXattr(x.Name); err != nil || size < xattrEntrySize+len(rest)+len(x.Value) || size > len(p) {
				t.Fatalf("%q, %d bytes of %d: %v", x, size, len(p), err)
			}
			p = p[size:]
		}
	})
}

// FuzzChunkTable puts arbitrary bytes in the place of the chunk table.
func FuzzChunkTable(f *testing.F) {
	img := small().write(f)
	m := openImage(f, img)
	f.Add(img[m.rafs.ChunkTable:][:m.rafs.ChunkTableLen])
	other := fixtureImage(f, "zstd")
	o := openImage(f, other)
	f.Add(other[o.rafs.ChunkTable:][:10*chunkInfoSize])
	f.Fuzz(func(t *testing.T, p []byte) {
		img := bytes.Clone(img)
		copy(img[m.rafs.ChunkTable:][:m.rafs.ChunkTableLen], p)
		soundness(t, img)
	})
}

// FuzzCheck changes bytes anywhere: each three bytes of the input are an offset
// and what is added there.
func FuzzCheck(f *testing.F) {
	img := small().write(f)
	f.Add([]byte{0, 0, 0})
	f.Add([]byte{0x10, 0, 1, 0x20, 0, 2, 0x40, 0x33, 0xff})
	f.Fuzz(func(t *testing.T, p []byte) {
		img := bytes.Clone(img)
		for edit := range slices.Chunk(p, 3) {
			if len(edit) == 3 {
				img[int(le.Uint16(edit))%len(img)] += edit[2]
			}
		}
		soundness(t, img)
	})
}
