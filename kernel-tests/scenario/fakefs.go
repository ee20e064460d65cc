package scenario

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A superblock is a mounted image in a fake kernel. It has no page cache: what is read
// again is asked for again.
type superblock struct {
	image   *erofs.Image
	volumes []volume // of device slots

	source string
	minor  int
	users  int // mounts and open files; guarded by fakeMounts.mu
	files  int // open files; guarded by fakeMounts.mu
	boot   volume
}

// A volume is a part of an image as the kernel has it open. An error is an errno.
type volume interface {
	io.ReaderAt
	Close() error
}

// newSuperblock reads an image's metadata from boot, which has size bytes, and owns
// everything, also with an error.
func newSuperblock(boot volume, size int64, volumes []volume) (*superblock, error) {
	sb := &superblock{boot: boot, volumes: volumes}
	var err error
	if sb.image, err = erofs.Open(boot, size); err != nil {
		sb.close()
		return nil, err
	}
	if n := len(sb.image.Devices()); n != len(volumes) {
		sb.close()
		return nil, fmt.Errorf("%d devices for %d slots: %w", len(volumes), n, syscall.EINVAL)
	}
	return sb, nil
}

func (sb *superblock) close() {
	for _, v := range sb.volumes {
		v.Close()
	}
	sb.boot.Close()
}

// read reads a range of a file that lies in it.
func (sb *superblock) read(n erofs.Inode, p []byte, off int64) error {
	clear(p)
	end := off + int64(len(p))
	for e, err := range sb.image.Extents(n) {
		if err != nil {
			return err
		}
		from, to := max(off, e.FileOff), min(end, e.FileOff+e.Len)
		if from >= to || e.Device == erofs.Hole {
			continue
		}
		v := sb.boot
		if e.Device > 0 {
			v = sb.volumes[e.Device-1]
		}
		if err := readTwice(v, p[from-off:to-off], e.Off+from-e.FileOff); err != nil {
			return err
		}
	}
	return nil
}

// readTwice reads a range of a volume, and when that fails page by page: the kernel's
// readahead fails silently and the page that is needed is asked for once more
// (kernel-protocols 1.8).
func readTwice(v volume, p []byte, off int64) error {
	if _, err := v.ReadAt(p, off); err == nil {
		return nil
	}
	for n := 0; len(p) > 0; p, off = p[n:], off+int64(n) {
		n = min(len(p), int(page-off%page))
		if _, err := v.ReadAt(p[:n], off); err != nil {
			return err
		}
	}
	return nil
}

const page = 4096

// A fakeView is what is mounted at a place in a fake kernel.
type fakeView struct {
	m     *fakeMounts
	point string
}

func (v fakeView) tree() (testenv.Tree, error) {
	sb, err := v.m.use(v.point)
	if err != nil {
		return nil, err
	}
	defer v.m.drop(sb, 1)
	list := testenv.Tree{}
	err = sb.image.Walk(func(path string, n erofs.Inode) error {
		e, err := sb.entry(n)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		list[path] = e
		return nil
	})
	return list, err
}

// entry describes an inode as the system calls would.
func (sb *superblock) entry(n erofs.Inode) (e testenv.TreeEntry, err error) {
	e = testenv.TreeEntry{
		Mode: n.Mode, UID: n.UID, GID: n.GID, Mtime: n.Sec*1e9 + int64(n.Nsec), Nlink: n.Nlink, Inode: strconv.FormatUint(n.NID, 10),
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Inode = ""
	case unix.S_IFLNK:
		e.Target, err = sb.image.Readlink(n)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = [2]uint32{n.Major, n.Minor}
	case unix.S_IFREG:
		p := make([]byte, n.Size)
		err = sb.read(n, p, 0)
		sum := sha256.Sum256(p)
		e.Size, e.SHA256 = n.Size, hex.EncodeToString(sum[:])
	}
	if err != nil {
		return e, err
	}
	list, err := sb.image.Xattrs(n)
	for _, x := range list {
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[x.Name] = hex.EncodeToString(x.Value)
	}
	return e, err
}

func (v fakeView) open(name string) (file, error) {
	sb, err := v.m.use(v.point)
	if err != nil {
		return nil, err
	}
	n, err := sb.image.Lookup(name)
	if err != nil {
		v.m.drop(sb, 1)
		return nil, err
	}
	return &fakeFile{v.m, sb, n}, nil
}

// mapped reads page by page: there are no page faults without a kernel.
func (v fakeView) mapped(name string) ([]byte, error) {
	f, err := v.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := make([]byte, f.(*fakeFile).inode.Size)
	for off := 0; off < len(p); off += page {
		if _, err := f.ReadAt(p[off:min(len(p), off+page)], int64(off)); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// run reads the program's header first and then all of its pages: nothing can be
// executed without a kernel.
func (v fakeView) run(name string) error {
	f, err := v.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 64), 0); err != nil {
		return err
	}
	_, err = v.mapped(name)
	return err
}

type fakeFile struct {
	m     *fakeMounts
	sb    *superblock
	inode erofs.Inode
}

func (f *fakeFile) ReadAt(p []byte, off int64) (int, error) {
	n := max(0, min(int64(len(p)), f.inode.Size-off))
	if err := f.sb.read(f.inode, p[:n], off); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func (f *fakeFile) Close() error {
	f.m.drop(f.sb, 1)
	return nil
}
