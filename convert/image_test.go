package convert

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A built is a converted image as its users see it.
type built struct {
	*erofs.Image
	caches [][]byte // the cache files, complete
}

// openDir reads the image in dir, verifies its metadata and every chunk and
// decodes the blobs.
func openDir(t testing.TB, dir string) *built {
	t.Helper()
	ctx := t.Context()
	f, err := os.Open(filepath.Join(dir, bootstrapName))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := erofs.Check(ctx, f, st.Size(), erofs.Limits{}); err != nil {
		t.Fatal(err)
	}
	m, err := erofs.Open(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	b := &built{Image: m}
	var tables []*chunk.Table
	for _, raw := range m.BlobEntries() {
		e, err := chunk.ParseEntry(raw)
		if err != nil {
			t.Fatal(err)
		}
		tables = append(tables, readBlob(ctx, t, filepath.Join(dir, blobsName, e.ID), e))
	}
	for c, err := range m.Chunks() {
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tables[c.Blob].SetDigest(int(c.Index), c.Off, c.Len, c.Digest); err != nil {
			t.Fatal(err)
		}
	}
	for i, raw := range m.BlobEntries() {
		e, _ := chunk.ParseEntry(raw)
		b.caches = append(b.caches, decodeBlob(t, filepath.Join(dir, blobsName, e.ID), tables[i]))
	}
	return b
}

func readBlob(ctx context.Context, t testing.TB, name string, e chunk.Entry) *chunk.Table {
	t.Helper()
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(p); hex.EncodeToString(sum[:]) != e.ID {
		t.Fatalf("%s is not what its name says", name)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := chunk.ReadTable(ctx, blobFile{f, int64(len(p))}, e)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func decodeBlob(t testing.TB, name string, table *chunk.Table) []byte {
	t.Helper()
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	d := chunk.NewDecoder()
	defer d.Close()
	cache := make([]byte, table.Size())
	for i := range table.Units() {
		u := table.Unit(i)
		if err := d.Decode(table, i, cache[u.Off:u.Off+u.Len], p[u.COff:u.COff+u.CLen]); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return cache
}

func (b *built) content(t testing.TB, n erofs.Inode) []byte {
	t.Helper()
	p := make([]byte, 0, n.Size)
	for e, err := range b.Extents(n) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Device < 1 {
			t.Fatalf("extent on device %d", e.Device)
		}
		p = append(p, b.caches[e.Device-1][e.Off:e.Off+e.Len]...)
	}
	return p
}

// tree lists the image.
func (b *built) tree(t testing.TB) testenv.Tree {
	t.Helper()
	tree := testenv.Tree{}
	err := b.Walk(func(name string, n erofs.Inode) error {
		e := testenv.TreeEntry{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Mtime: n.Sec*1e9 + int64(n.Nsec), Rdev: [2]uint32{n.Major, n.Minor},
			Nlink: n.Nlink, Inode: strconv.FormatUint(n.NID, 10),
		}
		switch n.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			e.Size = n.Size
			sum := sha256.Sum256(b.content(t, n))
			e.SHA256 = hex.EncodeToString(sum[:])
		case syscall.S_IFLNK:
			var err error
			if e.Target, err = b.Readlink(n); err != nil {
				return err
			}
		}
		xattrs, err := b.Xattrs(n)
		for _, x := range xattrs {
			if e.Xattrs == nil {
				e.Xattrs = make(map[string]string)
			}
			e.Xattrs[x.Name] = hex.EncodeToString(x.Value)
		}
		tree[name] = e
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// devices writes the complete cache files of the image in dir.
func devices(t testing.TB, dir string) (names []string) {
	t.Helper()
	for _, p := range openDir(t, dir).caches {
		names = append(names, writeFile(t, filepath.Join(t.TempDir(), "cache"), p))
	}
	return names
}

// mount mounts the image in dir through the kernel and returns where.
func mount(t testing.TB, dir string) string {
	t.Helper()
	testenv.Root(t)
	testenv.Kernel(t, "file-backed EROFS", erofs.Supported(t.TempDir()))
	o := erofs.MountOptions{Source: filepath.Join(dir, bootstrapName), Devices: devices(t, dir), Target: t.TempDir()}
	if err := erofs.Mount(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(o.Target, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return o.Target
}

// compareMount mounts the image in dir and compares what the kernel shows.
func compareMount(t testing.TB, want testenv.Tree, dir string) {
	t.Helper()
	got, err := testenv.ScanTree(mount(t, dir), true)
	if err != nil {
		t.Fatal(err)
	}
	want.Compare(t, got, true)
}
