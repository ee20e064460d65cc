package cachefiles

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// attachTime is how long the kernel may take to attach the file of an object
	// that it has accepted: some milliseconds in an emulated guest, and as much longer
	// as its workers wait for a processor. Only a dead cache is waited for in vain.
	attachTime = 10 * time.Second
	// attachPause is the first pause between tries; it doubles up to the second.
	attachPause    = time.Millisecond
	attachMaxPause = 20 * time.Millisecond
	// shortTries is how often a write may bring nothing.
	shortTries = 3
)

// ErrAlign says that a write is not one of whole pages: its offset, its length
// or its memory. Linux 6.1 would put the bytes elsewhere, so it is not tried.
var ErrAlign = errors.New("want an offset, a length and memory that are multiples of the page size")

// ErrWithdrawn says that the kernel has closed the object whose file this is. It asks
// for it anew, with another file, when somebody wants it.
var ErrWithdrawn = errors.New("the kernel has withdrawn it")

var errNoProgress = errors.New("the file system finds data and a hole")

// A File is the kernel's file of one object, to be filled. Its methods are safe
// for concurrent use.
type File struct {
	f      *os.File
	calls  Calls
	dir    string          // the cache root, whose file system it is on
	attach time.Duration   // how long the kernel may take to attach it
	gone   <-chan struct{} // closed when the kernel has withdrawn it; nil: never
}

// AlignedBuffer returns n bytes of memory, rounded up to whole pages, that
// [File.WriteAt] takes, and a function that gives it back.
func AlignedBuffer(n int) (p []byte, free func(), err error) {
	page := os.Getpagesize()
	n = (max(n, 1) + page - 1) / page * page
	p, err = unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, nil, fmt.Errorf("map %d bytes of memory: %w", n, err)
	}
	return p, func() { _ = unix.Munmap(p) }, nil
}

// WriteAt writes p at off. Both must be whole pages, and p page-aligned memory
// ([AlignedBuffer]); else the error is [ErrAlign] and nothing is written. It
// returns how many bytes, in whole pages, were written, and an error when that
// is not all: syscall.ENOSPC when the file system has no room, [ErrWithdrawn],
// os.ErrClosed after Close, syscall.ENOBUFS when the cache is dead. Before the kernel
// has attached the file, it waits for that.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	page := os.Getpagesize()
	if off < 0 || off%int64(page) != 0 || len(p)%page != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(p)))%uintptr(page) != 0 {
		return 0, fmt.Errorf("write %d bytes at %d to %s: %w", len(p), off, f.f.Name(), ErrAlign)
	}
	done := 0
	for idle := 0; done < len(p); {
		n, err := f.write(p[done:], off+int64(done))
		if err == nil && n < page {
			// Less than a page is written again, so that offsets stay aligned.
			if idle++; idle == shortTries {
				err = io.ErrShortWrite
			}
		}
		if err != nil {
			return done, fmt.Errorf("write %d bytes at %d to %s: %w", len(p)-done, off+int64(done), f.f.Name(), err)
		}
		// Kernels before 6.12.2 may say more than was asked for.
		if n = min(n, len(p)-done) / page * page; n > 0 {
			done, idle = done+n, 0
		}
	}
	return done, nil
}

// write is pwrite(2) that waits for the kernel to attach the file.
func (f *File) write(p []byte, off int64) (n int, err error) {
	err = f.attached(int64(len(p)), func(fd int) (err error) {
		n, err = f.calls.WriteAt(fd, p, off)
		return err
	})
	return n, err
}

// Data calls yield for each run of data below size, in order. It waits, and fails, as
// [File.WriteAt] does.
func (f *File) Data(size int64, yield func(off, end int64)) error {
	for end := int64(0); end < size; {
		off, err := f.seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && off >= size {
			return nil
		}
		if err == nil {
			end, err = f.seek(off, unix.SEEK_HOLE)
		}
		if err == nil && end <= off {
			err = fmt.Errorf("%w at %d", errNoProgress, off)
		}
		if err != nil {
			return fmt.Errorf("look for data in %s: %w", f.f.Name(), err)
		}
		yield(off, min(end, size))
	}
	return nil
}

func (f *File) seek(off int64, whence int) (at int64, err error) {
	err = f.attached(0, func(fd int) (err error) {
		at, err = f.calls.Seek(fd, off, whence)
		return err
	})
	return at, err
}

// attached calls do until it does not meet ENOBUFS any more. The kernel says
// that before it has attached the file, some time after it was accepted; after
// it has withdrawn it; and when the file system has no room for n bytes. Whoever
// uses the file, but to complete a READ, which never meets it, has to come by here.
func (f *File) attached(n int64, do func(fd int) error) error {
	var end time.Time
	for pause := attachPause; ; pause = min(2*pause, attachMaxPause) {
		err := control(f.f, do)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, os.ErrClosed) && f.withdrawn():
			return fmt.Errorf("%w: %w", ErrWithdrawn, err)
		case !errors.Is(err, unix.ENOBUFS):
			return err
		case f.full(n):
			return fmt.Errorf("no room in %s: %w", f.dir, unix.ENOSPC)
		}
		now := time.Now()
		if end.IsZero() {
			end = now.Add(f.attach)
		} else if now.After(end) {
			return fmt.Errorf("the kernel has no file for it, perhaps because its cache is dead: %w", err)
		}
		select {
		case <-f.gone:
			return fmt.Errorf("%w: %w", ErrWithdrawn, err)
		case <-time.After(pause):
		}
	}
}

// withdrawn reports whether the file's object has ended.
func (f *File) withdrawn() bool {
	select {
	case <-f.gone:
		return true
	default:
		return false
	}
}

// full reports whether the cache's file system has no room for n bytes.
func (f *File) full(n int64) bool {
	var s unix.Statfs_t
	if err := unix.Statfs(f.dir, &s); err != nil {
		return false
	}
	return s.Bavail == 0 || s.Bavail < uint64(n)/uint64(s.Bsize)+1 || s.Files > 0 && s.Ffree == 0
}

// complete ends READ id of the file's object.
func (f *File) complete(id uint32) error {
	return control(f.f, func(fd int) error { return f.calls.Complete(fd, id) })
}

// Close closes the file, once the calls under way have ended; a second call does
// nothing.
func (f *File) Close() error {
	if err := f.f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close %s: %w", f.f.Name(), err)
	}
	return nil
}
