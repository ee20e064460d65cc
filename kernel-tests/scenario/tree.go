package scenario

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// chunkSize is the converter's, in bytes.
const chunkSize = 256 << 10

// A tree is a file tree that an image is made of: what must be found in the image.
type tree struct {
	list testenv.Tree
	data map[string][]byte // of the regular files; hard links have the data of their first name
	rnd  *rand.ChaCha8
	when int64 // mtime of the next entry, in ns
}

func newTree(seed byte) *tree {
	tr := &tree{list: testenv.Tree{}, data: map[string][]byte{}, rnd: rand.NewChaCha8([32]byte{seed}), when: 1_500_000_000_123_456_789}
	tr.dir(".")
	return tr
}

func (tr *tree) add(name string, kind, mode uint32, e testenv.TreeEntry) {
	tr.when += 1_000_000_007
	e.Mode, e.Mtime = kind|mode, tr.when
	if kind != unix.S_IFDIR && e.Nlink == 0 {
		e.Nlink = 1
	}
	tr.list[name] = e
}

func (tr *tree) dir(name string) { tr.add(name, unix.S_IFDIR, 0o755, testenv.TreeEntry{}) }

func (tr *tree) file(name string, p []byte, mode uint32, xattrs map[string]string) {
	sum := sha256.Sum256(p)
	tr.data[name] = p
	tr.add(name, unix.S_IFREG, mode, testenv.TreeEntry{
		UID: 1000, GID: 70000, Size: int64(len(p)), SHA256: hex.EncodeToString(sum[:]), Xattrs: xattrs,
	})
}

// link makes name a further name of the file old.
func (tr *tree) link(name, old string) {
	e := tr.list[old]
	e.Inode = old
	e.Nlink++
	tr.list[name], tr.data[name] = e, tr.data[old]
	for other, o := range tr.list {
		if other == old || o.Inode == old {
			tr.list[other] = e
		}
	}
}

// random returns bytes that do not compress, text some that do.
func (tr *tree) random(n int) []byte {
	p := make([]byte, n)
	_, _ = tr.rnd.Read(p) // never fails
	return p
}

func (tr *tree) text(n int) []byte {
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "line %d of %d\n", b.Len(), tr.rnd.Uint64()%1e6)
	}
	return b.Bytes()[:n]
}

// standardTree has files around every border that reads may meet. It has about 5 MB,
// with program, which something executes.
func standardTree(seed byte, program []byte) *tree {
	tr := newTree(seed)
	for _, d := range []string{"big", "bin", "empty", "links", "sizes", "small"} {
		tr.dir(d)
	}
	for _, border := range []int{0, 4096, 128 << 10, chunkSize, 2 * chunkSize} {
		for _, n := range []int{border - 1, border, border + 1} {
			if n >= 0 {
				tr.file(fmt.Sprintf("sizes/%d", n), tr.random(n), 0o644, nil)
			}
		}
	}
	for i := range 64 {
		tr.file(fmt.Sprintf("small/%02d", i), tr.text(100+i*97), 0o600, nil)
	}
	tr.file("big/random", tr.random(5*chunkSize/2), 0o644, nil)
	tr.file("big/text", tr.text(4*chunkSize+777), 0o644, nil)
	tr.file("big/zeros", make([]byte, 3*chunkSize), 0o644, nil)
	tr.file("bin/true", program, 0o755, nil)
	tr.file("links/attributes", tr.text(5000), 0o4755, map[string]string{
		"user.empty": "", "user.note": hex.EncodeToString([]byte("a value\x00with a NUL")), "trusted.long": hex.EncodeToString(tr.random(900)),
	})
	tr.link("links/hard", "big/random")
	tr.link("small/hard", "big/random")
	tr.add("links/soft", unix.S_IFLNK, 0o777, testenv.TreeEntry{Target: "../big/text"})
	tr.add("links/fifo", unix.S_IFIFO, 0o622, testenv.TreeEntry{})
	tr.add("links/null", unix.S_IFCHR, 0o666, testenv.TreeEntry{Rdev: [2]uint32{1, 3}})
	return tr
}

// size is how many bytes the files have, each once.
func (tr *tree) size() (n int64) {
	for name := range tr.data {
		if e := tr.list[name]; e.Inode == "" || e.Inode == name {
			n += e.Size
		}
	}
	return n
}

// files are the names of the regular files, sorted.
func (tr *tree) files() []string { return slices.Sorted(maps.Keys(tr.data)) }

// chosen are some of them, for scenarios in which every read takes its time.
func (tr *tree) chosen() []string {
	return slices.DeleteFunc(tr.files(), func(name string) bool { return strings.HasPrefix(name, "small/") })
}

// writeTar writes the tree to a new file, from which the converter makes an image.
func (tr *tree) writeTar(file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, name := range slices.Sorted(maps.Keys(tr.list)) {
		if err := tr.writeEntry(w, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return w.Close()
}

var tarTypes = map[uint32]byte{
	unix.S_IFDIR: tar.TypeDir, unix.S_IFREG: tar.TypeReg, unix.S_IFLNK: tar.TypeSymlink,
	unix.S_IFIFO: tar.TypeFifo, unix.S_IFCHR: tar.TypeChar,
}

func (tr *tree) writeEntry(w *tar.Writer, name string) error {
	e := tr.list[name]
	h := &tar.Header{
		Typeflag: tarTypes[e.Mode&unix.S_IFMT], Name: name, Linkname: e.Target, Size: e.Size, Mode: int64(e.Mode & 0o7777),
		Uid: int(e.UID), Gid: int(e.GID), Devmajor: int64(e.Rdev[0]), Devminor: int64(e.Rdev[1]),
		Format: tar.FormatPAX, PAXRecords: map[string]string{}, ModTime: time.Unix(0, e.Mtime),
	}
	for key, value := range e.Xattrs {
		p, err := hex.DecodeString(value)
		if err != nil {
			return err
		}
		h.PAXRecords["SCHILY.xattr."+key] = string(p)
	}
	if e.Inode != "" && e.Inode != name {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, e.Inode, 0
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if h.Size == 0 {
		return nil
	}
	_, err := io.Copy(w, bytes.NewReader(tr.data[name]))
	return err
}

// tinyTree is a tree of one file, n distinguishes it from others.
func tinyTree(n int) *tree {
	tr := newTree(0)
	tr.file("number", []byte("image "+strconv.Itoa(n)+"\n"), 0o644, nil)
	return tr
}
