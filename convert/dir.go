package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"

	"github.com/erofsd/erofsd/erofs"
)

// A dirReader reads a directory tree as it lies there; names that start with
// ".wh." are nothing special.
type dirReader struct {
	sink   sink
	budget *budget
	links  map[inode]*erofs.Node // what has more than one name
	passed func(int64)           // told of every part that was read
	xattrs []byte                // buffers of readXattrs
	names  []byte
}

type inode struct{ dev, ino uint64 }

// readDir reads the tree at root, in the order of its names, and calls passed
// with every number of bytes read. Everything on other file systems mounted
// below comes along.
func readDir(ctx context.Context, root string, s sink, b *budget, passed func(int64)) (*erofs.Node, error) {
	d := &dirReader{
		sink: s, budget: b, passed: passed, links: make(map[inode]*erofs.Node),
		xattrs: make([]byte, 64<<10), names: make([]byte, 64<<10),
	}
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, err
	}
	return d.read(ctx, root, "", 0)
}

func (d *dirReader) read(ctx context.Context, name, base string, depth int) (*erofs.Node, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var st syscall.Stat_t
	if err := syscall.Lstat(name, &st); err != nil {
		return nil, &fs.PathError{Op: "lstat", Path: name, Err: err}
	}
	id := inode{st.Dev, st.Ino}
	dir := st.Mode&syscall.S_IFMT == syscall.S_IFDIR
	if n := d.links[id]; n != nil && !dir {
		return n, d.budget.entry(nil, base)
	}
	n := &erofs.Node{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid,
		Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec),
	}
	if st.Nlink > 1 && !dir {
		d.links[id] = n
	}
	if err := d.readXattrs(name, n); err != nil {
		return nil, err
	}
	var err error
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		n.Size = st.Size
		err = d.readFile(ctx, name, n, &st)
	case syscall.S_IFDIR:
		err = d.readChildren(ctx, name, n, depth)
	case syscall.S_IFLNK:
		if n.Target, err = os.Readlink(name); err == nil {
			err = checkTarget(n.Target)
		}
	case syscall.S_IFCHR, syscall.S_IFBLK:
		// glibc's sysmacros.h; the kernel's own numbers are 12 and 20 bits.
		n.Major = uint32(st.Rdev>>8&0xfff | st.Rdev>>32&^0xfff)
		n.Minor = uint32(st.Rdev&0xff | st.Rdev>>12&^0xff)
	}
	if err != nil {
		return nil, err
	}
	return n, d.budget.entry(n, base)
}

func (d *dirReader) readChildren(ctx context.Context, name string, n *erofs.Node, depth int) error {
	if depth >= maxDepth {
		return fmt.Errorf("%s: more than %d directories deep", name, maxDepth)
	}
	list, err := os.ReadDir(name)
	if err != nil {
		return err
	}
	n.Children = make(map[string]*erofs.Node, len(list))
	for _, e := range list {
		c, err := d.read(ctx, name+"/"+e.Name(), e.Name(), depth+1)
		if err != nil {
			return err
		}
		n.Children[e.Name()] = c
	}
	return nil
}

// readFile reads the file name, of which lstat said st. A file that changes
// while it is read would be a mix of two states: that is an error.
func (d *dirReader) readFile(ctx context.Context, name string, n *erofs.Node, st *syscall.Stat_t) error {
	if st.Size == 0 {
		return nil
	}
	fd, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer syscall.Close(fd)
	r := &passReader{&fileReader{fd: fd, size: st.Size, sparse: st.Blocks*512 < st.Size}, d.passed}
	if err := d.sink.file(ctx, n, r, st.Size); errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%s changed while it was read: convert a tree that nobody writes to", name)
	} else if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var now syscall.Stat_t
	if err := syscall.Fstat(fd, &now); err != nil {
		return &fs.PathError{Op: "fstat", Path: name, Err: err}
	}
	if now.Ino != st.Ino || now.Dev != st.Dev || now.Size != st.Size || now.Mtim != st.Mtim {
		return fmt.Errorf("%s changed while it was read: convert a tree that nobody writes to", name)
	}
	return nil
}

// A fileReader reads a file without the runtime's poller, which costs more than
// the read of a small file, and jumps over holes.
type fileReader struct {
	fd        int
	size, off int64
	sparse    bool
	hole      int64 // up to here there are no data
	data      int64 // up to here there are, known only when sparse
}

const (
	seekData = 3 // SEEK_DATA
	seekHole = 4 // SEEK_HOLE
)

func (f *fileReader) Read(p []byte) (int, error) {
	if f.off >= f.size {
		return 0, io.EOF
	}
	if f.sparse && f.off >= f.data {
		f.find()
	}
	if f.off < f.hole {
		n := int(min(int64(len(p)), f.hole-f.off))
		clear(p[:n])
		f.off += int64(n)
		return n, nil
	}
	if f.sparse {
		p = p[:min(int64(len(p)), f.data-f.off)]
	}
	for {
		n, err := syscall.Pread(f.fd, p, f.off)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		f.off += int64(n)
		return n, nil
	}
}

// find learns where the next hole and the data behind it are. A file system that
// cannot tell has no holes.
func (f *fileReader) find() {
	start, err := syscall.Seek(f.fd, f.off, seekData)
	if err == syscall.ENXIO { // no data from here to the end
		f.hole, f.data = f.size, f.size
		return
	}
	end := f.size
	if err == nil {
		end, err = syscall.Seek(f.fd, start, seekHole)
	}
	if err != nil || start < f.off || end <= start {
		f.sparse = false
		return
	}
	f.hole, f.data = min(start, f.size), min(end, f.size)
}

// readXattrs reads the xattrs of name itself, not of what a symlink points to.
func (d *dirReader) readXattrs(name string, n *erofs.Node) error {
	size, err := xattrCall(syscall.SYS_LLISTXATTR, name, nil, d.names)
	if err == syscall.ENOTSUP || size == 0 && err == nil {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "llistxattr", Path: name, Err: err}
	}
	for x := range strings.SplitSeq(strings.TrimSuffix(string(d.names[:size]), "\x00"), "\x00") {
		key := append([]byte(x), 0)
		size, err := xattrCall(syscall.SYS_LGETXATTR, name, key, d.xattrs)
		if err == syscall.ENODATA { // gone since, or not ours to see
			continue
		}
		if err != nil {
			return &fs.PathError{Op: "lgetxattr " + x, Path: name, Err: err}
		}
		n.Xattrs = append(n.Xattrs, erofs.Xattr{Name: x, Value: append([]byte{}, d.xattrs[:size]...)})
	}
	return sortXattrs(n)
}

// xattrCall makes the system calls that package syscall only has in the forms
// that follow symlinks. key is nil for llistxattr, else it ends with a zero.
func xattrCall(trap uintptr, name string, key, buf []byte) (int, error) {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	var r uintptr
	var errno syscall.Errno
	if key == nil {
		r, _, errno = syscall.Syscall(trap, uintptr(unsafe.Pointer(p)),
			uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
	} else {
		r, _, errno = syscall.Syscall6(trap, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&key[0])),
			uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
