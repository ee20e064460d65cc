package blobmgr

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A cacheFile is what a Blob does with its cache file; tests put disk errors
// in between.
type cacheFile interface {
	io.ReaderAt
	io.WriterAt
	// Datasync makes what was written durable (fdatasync).
	Datasync() error
	// Data calls yield for each run of data, in order, up to size (SEEK_DATA and
	// SEEK_HOLE).
	Data(size int64, yield func(off, end int64)) error
	// Reading drops what can be dropped of [off, off+n) from the page cache and reports
	// whether a read of the disk is under way there.
	Reading(off, n int64) (bool, error)
	// PunchHole gives the disk of [off, off+n) back; it reads as zeros then.
	PunchHole(off, n int64) error
}

// A sparseFile is the cacheFile on disk.
type sparseFile struct{ *os.File }

func (f sparseFile) Datasync() error { return unix.Fdatasync(int(f.Fd())) }

func (f sparseFile) Data(size int64, yield func(off, end int64)) error {
	for end := int64(0); end < size; {
		off, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // only a hole is left
			return nil
		}
		if err != nil {
			return err
		}
		if end, err = unix.Seek(int(f.Fd()), off, unix.SEEK_HOLE); err != nil {
			return err
		}
		yield(off, end)
	}
	return nil
}

// Reading compares how many pages are in the page cache (cachestat) with how many of
// them are up to date (mincore): the others are being read. One that goes in between
// counts as being read, too.
func (f sparseFile) Reading(off, n int64) (bool, error) {
	fd := int(f.Fd())
	if err := unix.Fadvise(fd, off, n, unix.FADV_DONTNEED); err != nil {
		return true, err
	}
	var cached unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), &unix.CachestatRange{Off: uint64(off), Len: uint64(n)}, &cached, 0); err != nil {
		return true, err
	}
	if cached.Cache == 0 {
		return false, nil
	}
	p, err := unix.Mmap(fd, off, int(n), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return true, err
	}
	defer unix.Munmap(p)
	pages := make([]byte, (len(p)+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		return true, errno
	}
	good := uint64(0)
	for _, page := range pages {
		good += uint64(page & 1)
	}
	return good < cached.Cache, nil
}

func (f sparseFile) PunchHole(off, n int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// A fileSystem is what a directory does with its names and small files; tests put power
// cuts and disk errors in between.
type fileSystem interface {
	open(name string, flags int) (*os.File, error)
	write(f *os.File, p []byte) error
	syncFile(f *os.File) error
	rename(from, to string) error
	unlink(name string) error
	sync() error // what the names are
}

// A directory is the cache directory. Names are used as they are, relative to the
// open descriptor, and symbolic links in them are never followed.
type directory struct {
	f   *os.File
	sys fileSystem
	// cold says that nothing was in the page cache when d was opened, and that the disk
	// took everything since.
	cold atomic.Bool

	mu sync.Mutex // guards what follows
	// undone are names that were removed, but may come back after a power cut.
	undone map[string]bool
}

// openDirectory opens path, makes it when it is missing, and locks it against
// other processes.
func openDirectory(path string) (*directory, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	d := &directory{f: f, sys: host{f}, undone: make(map[string]bool)}
	if err := d.claim(fd); err != nil {
		d.f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

func (d *directory) claim(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("it belongs to user %d: choose a directory of our own", st.Uid)
	}
	if st.Mode&0o022 != 0 {
		return fmt.Errorf("others may write to it (mode %#o): chmod it to 0700", st.Mode&0o777)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return errors.New("another process uses this cache directory: stop it or choose another directory")
		}
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

func (d *directory) path(name string) string { return filepath.Join(d.f.Name(), name) }

// Close unlocks and closes d.
func (d *directory) Close() error { return d.f.Close() }

// A host is the fileSystem on disk.
type host struct{ dir *os.File }

func (h host) open(name string, flags int) (*os.File, error) {
	path := filepath.Join(h.dir.Name(), name)
	fd, err := unix.Openat(int(h.dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (h host) write(f *os.File, p []byte) error {
	_, err := f.Write(p)
	return err
}

func (h host) syncFile(f *os.File) error { return f.Sync() }

func (h host) rename(from, to string) error {
	return unix.Renameat(int(h.dir.Fd()), from, int(h.dir.Fd()), to)
}

func (h host) unlink(name string) error { return unix.Unlinkat(int(h.dir.Fd()), name, 0) }

func (h host) sync() error { return h.dir.Sync() }

// owned reports whether f is a plain file that only we can have written.
func owned(f *os.File) (size int64, ok bool) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, false
	}
	return st.Size, st.Mode&unix.S_IFMT == unix.S_IFREG && int(st.Uid) == os.Geteuid() && st.Nlink == 1 && st.Mode&0o077 == 0
}

// openCache opens the cache file name for reading and writing. One that is not
// ours or has another size is unlinked, not truncated: it may still be mounted.
func (d *directory) openCache(name string, size int64) (*os.File, error) {
	f, err := d.sys.open(name, unix.O_RDWR)
	if err == nil {
		if have, ok := owned(f); ok && have == size {
			return f, nil
		}
		f.Close()
	}
	if err := d.remove(name); err != nil {
		return nil, err
	}
	f, err = d.sys.open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, errors.Join(err, d.remove(name))
	}
	return f, nil
}

// is reports whether f is the file name, a cache file of ours of that size.
func (d *directory) is(name string, f *os.File, size int64) bool {
	var want, have unix.Stat_t
	if unix.Fstatat(int(d.f.Fd()), name, &want, unix.AT_SYMLINK_NOFOLLOW) != nil || unix.Fstat(int(f.Fd()), &have) != nil {
		return false
	}
	n, ok := owned(f)
	return ok && n == size && want.Dev == have.Dev && want.Ino == have.Ino
}

// openKept opens the cache file name for reading; nil when there is none of that size
// that only we can have written.
func (d *directory) openKept(name string, size int64) (*os.File, error) {
	f, err := d.sys.open(name, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if have, ok := owned(f); !ok || have != size {
		return nil, f.Close()
	}
	return f, nil
}

// read returns the content of a small file, nil when there is none that we could
// have written or it has more than limit bytes.
func (d *directory) read(name string, limit int64) []byte {
	f, err := d.sys.open(name, unix.O_RDONLY)
	if err != nil {
		return nil
	}
	defer f.Close()
	size, ok := owned(f)
	if !ok || size > limit {
		return nil
	}
	p := make([]byte, size)
	if _, err := io.ReadFull(f, p); err != nil {
		return nil
	}
	return p
}

// write replaces the file name by p atomically; durable says that it must survive
// a power cut once write returns.
func (d *directory) write(name string, p []byte, durable bool) error {
	tmp := name + tmpSuffix
	if err := d.remove(tmp); err != nil {
		return err
	}
	f, err := d.sys.open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	err = d.sys.write(f, p)
	if err == nil && durable {
		err = d.sys.syncFile(f)
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = d.sys.rename(tmp, name)
	}
	if err == nil && durable {
		err = d.sys.sync()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", d.path(name), err), d.remove(tmp))
	}
	return nil
}

// sync makes the file name durable.
func (d *directory) sync(name string) error {
	f, err := d.sys.open(name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	return errors.Join(d.sys.syncFile(f), f.Close())
}

// exists reports whether there may be something called name.
func (d *directory) exists(name string) bool {
	var st unix.Stat_t
	return !errors.Is(unix.Fstatat(int(d.f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW), unix.ENOENT)
}

// removeDurably unlinks name, if it is there, so that it does not come back after a power
// cut. One caller at a time has a name.
func (d *directory) removeDurably(name string) error {
	d.mu.Lock()
	undone := d.undone[name]
	d.mu.Unlock()
	if !undone && !d.exists(name) {
		return nil
	}
	if err := d.remove(name); err != nil {
		return err
	}
	err := d.sys.sync()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.undone[name] = true
		return fmt.Errorf("remove %s for good: %w", d.path(name), err)
	}
	delete(d.undone, name)
	return nil
}

// remove unlinks name if it is there.
func (d *directory) remove(name string) error {
	if err := d.sys.unlink(name); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove", Path: d.path(name), Err: err}
	}
	return nil
}

// names returns what is in d and ends in suffix, without it.
func (d *directory) names(suffix string) ([]string, error) {
	// Through a descriptor of its own: d.f's has a position, and it is shared.
	entries, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d", d.f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("list cache directory %s: %w", d.f.Name(), err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// usage returns what the file name takes on disk, in bytes.
func (d *directory) usage(name string) int64 {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0
	}
	return st.Blocks * 512
}
