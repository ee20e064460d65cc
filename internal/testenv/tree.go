package testenv

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// A Tree is what a file tree should be, or is: entries by path, the root's
// being ".". Build one with [LoadTree], [ScanTree], or entry by entry.
type Tree map[string]TreeEntry

// A TreeEntry is one path, in the form of the fixtures' tree.jsonl.
type TreeEntry struct {
	Mode     uint32            // st_mode
	UID, GID uint32            //
	Size     int64             // regular files
	SHA256   string            // regular files; empty: not known, not compared
	Target   string            // symbolic links
	Rdev     [2]uint32         // devices: major, minor
	Xattrs   map[string]string // values in hexadecimal
	Mtime    int64             // ns since 1970
	Nlink    uint32            // 0: not known, not compared
	Inode    string            // the same for all names of one inode, else different; empty: the only name
}

// LoadTree returns the tree that the file name (tree.jsonl or layered.jsonl) in
// the [Fixtures] describes.
func LoadTree(t testing.TB, name string) Tree {
	t.Helper()
	f, err := os.Open(filepath.Join(Fixtures(t), name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tree := Tree{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var l struct {
			TreeEntry
			Path, Mode string
			Nlink      *uint32
			Hardlink   string
		}
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			t.Fatalf("%s: %v in %s", name, err, lines.Bytes())
		}
		mode, err := strconv.ParseUint(l.Mode, 0, 32)
		if err != nil {
			t.Fatalf("%s: %s: mode: %v", name, l.Path, err)
		}
		e := l.TreeEntry
		e.Mode, e.Inode = uint32(mode), l.Hardlink
		if l.Nlink != nil {
			e.Nlink = *l.Nlink
		}
		tree[l.Path] = e
	}
	if err := lines.Err(); err != nil || len(tree) == 0 {
		t.Fatalf("%s: %d entries, %v", name, len(tree), err)
	}
	return tree
}

// ScanTree describes the tree in directory root as the system calls show it:
// lstat, readlink, llistxattr and, with sums, the contents of all files, several
// at a time.
func ScanTree(root string, sums bool) (Tree, error) {
	var paths []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		return nil, err
	}
	entries := make([]TreeEntry, len(paths))
	var g errgroup.Group
	g.SetLimit(2 * runtime.NumCPU())
	for i, path := range paths {
		g.Go(func() error {
			var err error
			if entries[i], err = scanEntry(path, sums); err != nil {
				return fmt.Errorf("scan %q: %w", path, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	tree := make(Tree, len(paths))
	for i, path := range paths {
		name, err := filepath.Rel(root, path)
		if err != nil {
			return nil, err
		}
		tree[name] = entries[i]
	}
	return tree, nil
}

func scanEntry(path string, sums bool) (e TreeEntry, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return e, fmt.Errorf("lstat: %w", err)
	}
	e = TreeEntry{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid,
		Mtime: st.Mtim.Nano(), Nlink: uint32(st.Nlink), Inode: strconv.FormatUint(st.Ino, 10),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = st.Size
		if sums {
			e.SHA256, err = sum(path)
		}
	case unix.S_IFLNK:
		e.Target, err = os.Readlink(path)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = [2]uint32{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	case unix.S_IFDIR:
		e.Inode = ""
	}
	if err != nil {
		return e, err
	}
	e.Xattrs, err = scanXattrs(path)
	return e, err
}

func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func scanXattrs(path string) (map[string]string, error) {
	n, err := unix.Llistxattr(path, nil)
	if err == unix.ENOTSUP || n == 0 && err == nil {
		return nil, nil // most paths: no buffer for them
	}
	const most = 64 << 10 // XATTR_LIST_MAX and XATTR_SIZE_MAX
	buf, value := make([]byte, most), make([]byte, most)
	n, err = unix.Llistxattr(path, buf)
	if err != nil {
		return nil, fmt.Errorf("llistxattr: %w", err)
	}
	if n == 0 {
		return nil, nil // overlayfs counts its own names, and lists none of them
	}
	list := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("lgetxattr %s: %w", name, err)
		}
		list[name] = hex.EncodeToString(value[:n])
	}
	return list, nil
}

// Compare reports to t how got differs from want: one line for each path, the
// first 20. Times are compared to the second, as nydus's tools keep no more, or
// to the nanosecond; the root's is not, as a tar need not have it.
func (want Tree) Compare(t testing.TB, got Tree, nanoseconds bool) {
	t.Helper()
	lines := want.diff(got, nanoseconds)
	for i, l := range lines {
		if i == 20 {
			t.Errorf("... and %d more of %d paths", len(lines)-i, len(want))
			return
		}
		t.Error(l)
	}
}

func (want Tree) diff(got Tree, nanoseconds bool) (lines []string) {
	all := maps.Clone(want)
	maps.Copy(all, got)
	wantGroup, gotGroup := want.groups(), got.groups()
	for _, path := range slices.Sorted(maps.Keys(all)) {
		w, ok := want[path]
		if !ok {
			lines = append(lines, fmt.Sprintf("%q: should not exist (mode %o)", path, got[path].Mode))
			continue
		}
		g, ok := got[path]
		if !ok {
			lines = append(lines, fmt.Sprintf("%q: is missing (mode %o)", path, w.Mode))
			continue
		}
		if path == "." {
			g.Mtime = w.Mtime
		}
		d := w.diff(g, nanoseconds)
		if wg, gg := wantGroup[path], gotGroup[path]; wg != gg {
			d = append(d, fmt.Sprintf("same inode as %q, want %q", gg, wg))
		}
		if len(d) > 0 {
			lines = append(lines, fmt.Sprintf("%q: %s", path, strings.Join(d, "; ")))
		}
	}
	return lines
}

// groups returns for each path the first path of the same inode.
func (tree Tree) groups() map[string]string {
	first, groups := map[string]string{}, make(map[string]string, len(tree))
	for _, path := range slices.Sorted(maps.Keys(tree)) {
		inode := tree[path].Inode
		if _, ok := first[inode]; inode == "" || !ok {
			first[inode] = path
		}
		groups[path] = first[inode]
	}
	return groups
}

func (want TreeEntry) diff(got TreeEntry, nanoseconds bool) (d []string) {
	differ := func(what string, got, want any) {
		if got != want {
			d = append(d, fmt.Sprintf("%s %v, want %v", what, got, want))
		}
	}
	differ("mode", strconv.FormatUint(uint64(got.Mode), 8), strconv.FormatUint(uint64(want.Mode), 8))
	differ("uid", got.UID, want.UID)
	differ("gid", got.GID, want.GID)
	differ("size", got.Size, want.Size)
	differ("target", got.Target, want.Target)
	differ("device", got.Rdev, want.Rdev)
	if nanoseconds {
		differ("mtime", got.Mtime, want.Mtime)
	} else {
		differ("mtime", floorSeconds(got.Mtime), floorSeconds(want.Mtime))
	}
	if want.Nlink != 0 && got.Nlink != 0 {
		differ("nlink", got.Nlink, want.Nlink)
	}
	if want.SHA256 != "" && got.SHA256 != "" {
		differ("sha256", got.SHA256, want.SHA256)
	}
	both := maps.Clone(want.Xattrs)
	if both == nil {
		both = map[string]string{}
	}
	maps.Copy(both, got.Xattrs)
	for _, name := range slices.Sorted(maps.Keys(both)) {
		w, wok := want.Xattrs[name]
		g, gok := got.Xattrs[name]
		if w != g || wok != gok {
			d = append(d, fmt.Sprintf("attribute %s %.80q (%v), want %.80q (%v)", name, g, gok, w, wok))
		}
	}
	return d
}

// floorSeconds also rounds times before 1970 down.
func floorSeconds(ns int64) int64 {
	s := ns / 1e9
	if ns%1e9 < 0 {
		s--
	}
	return s
}
