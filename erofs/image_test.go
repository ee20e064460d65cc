package erofs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

// fixtures are nydus's images with the list of their paths.
var fixtures = map[string]string{
	"zstd": "tree.jsonl", "lz4": "tree.jsonl", "none": "tree.jsonl", "sha256-64k": "tree.jsonl",
	"batch": "tree.jsonl", "layered": "layered.jsonl", "zran": "layered.jsonl",
}

func readFixture(t testing.TB, name string) []byte {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), name, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func open(t testing.TB, image []byte) *erofs.Image {
	t.Helper()
	m, err := erofs.Open(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func check(image []byte, l erofs.Limits) (*erofs.Summary, error) {
	return erofs.Check(context.Background(), bytes.NewReader(image), int64(len(image)), l)
}

// imageTree describes m as the reader sees it; with data, which are the image
// and its devices, contents too.
func imageTree(m *erofs.Image, data ...[]byte) (testenv.Tree, error) {
	tree := testenv.Tree{}
	err := m.Walk(func(path string, n erofs.Inode) error {
		var err error
		e := testenv.TreeEntry{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Nlink: n.Nlink,
			Mtime: n.Sec*1e9 + int64(n.Nsec), Rdev: [2]uint32{n.Major, n.Minor},
		}
		if !n.IsDir() {
			e.Inode = strconv.FormatUint(n.NID, 10)
		}
		if n.IsRegular() {
			e.Size = n.Size
			if data != nil {
				if e.SHA256, err = content(m, n, data); err != nil {
					return err
				}
			}
		}
		if n.Mode&0o170000 == 0o120000 {
			if e.Target, err = m.Readlink(n); err != nil {
				return err
			}
		}
		list, err := m.Xattrs(n)
		for _, x := range list {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[x.Name] = hex.EncodeToString(x.Value)
		}
		tree[path] = e
		return err
	})
	return tree, err
}

// content returns the digest of n's data.
func content(m *erofs.Image, n erofs.Inode, data [][]byte) (string, error) {
	h := sha256.New()
	for e, err := range m.Extents(n) {
		if err != nil {
			return "", err
		}
		if e.Device == erofs.Hole {
			h.Write(make([]byte, e.Len))
		} else {
			h.Write(data[e.Device][e.Off : e.Off+e.Len])
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func TestFixtures(t *testing.T) {
	for name, list := range fixtures {
		t.Run(name, func(t *testing.T) {
			image := readFixture(t, name)
			want := testenv.LoadTree(t, list)
			m := open(t, image)
			got, err := imageTree(m)
			if err != nil {
				t.Fatal(err)
			}
			want.Compare(t, got, false)

			sum, err := check(image, erofs.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if sum.Entries != int64(len(want)-1) {
				t.Errorf("Check counts %d entries, want %d", sum.Entries, len(want)-1)
			}
			if len(sum.Blobs) != len(m.BlobEntries()) || !sum.RAFS {
				t.Errorf("Check says %+v", sum)
			}
		})
	}
}

func TestLookup(t *testing.T) {
	m := open(t, readFixture(t, "zstd"))
	for path, e := range testenv.LoadTree(t, "tree.jsonl") {
		n, err := m.Lookup("/" + path)
		if err != nil {
			t.Fatal(err)
		}
		if n.Mode != e.Mode {
			t.Errorf("%q: mode %o, want %o", path, n.Mode, e.Mode)
		}
	}
	for _, path := range []string{"no", "deep/no", "big/rand-2m/below-a-file"} {
		if _, err := m.Lookup(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v, want not exist", path, err)
		}
	}
}

func TestChunks(t *testing.T) {
	for name := range fixtures {
		m := open(t, readFixture(t, name))
		listed := map[[2]uint32]erofs.ChunkInfo{}
		for c, err := range m.Chunks() {
			if err != nil {
				t.Fatal(err)
			}
			listed[[2]uint32{c.Blob, c.Index}] = c
		}
		if want := int(m.RAFS().ChunkTableLen / 80); len(listed) != want || want == 0 {
			t.Errorf("%s: %d different chunks of %d", name, len(listed), want)
		}
		err := m.Walk(func(path string, n erofs.Inode) error {
			if !n.IsRegular() {
				return nil
			}
			end := int64(0)
			for e, err := range m.Extents(n) {
				if err != nil {
					return err
				}
				c := listed[[2]uint32{uint32(e.Device - 1), e.Chunk}]
				if c.Off != e.Off || c.Len != e.Len || e.FileOff != end {
					return fmt.Errorf("%s: extent %+v, chunk %+v", path, e, c)
				}
				end += e.Len
			}
			if end != n.Size {
				return fmt.Errorf("%s: extents for %d bytes of %d", path, end, n.Size)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
