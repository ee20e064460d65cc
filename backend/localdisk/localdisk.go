package localdisk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
)

// Options say where the disk is. Device is needed.
type Options struct {
	// Device is the path of a block device or a regular file, or of a symbolic link to
	// one.
	Device string
	// DisableGPT takes the disk as it is, without a partition table: Blobs says where
	// each blob lies. Without Blobs, the disk is one blob from its start, whoever
	// asks; the digests of chunks tell whether it is the right one.
	DisableGPT bool
	Blobs      map[digest.Digest]Extent
}

// An Extent is a run of bytes on the disk.
type Extent struct{ Off, Size int64 }

// A Store is a [backend.Store] over a disk. It is safe for concurrent use.
type Store struct{ o Options }

// New returns the store over the disk o.Device, which must be there and whose table, if
// it is to have one, must be right. It keeps no descriptor open.
func New(o Options) (*Store, error) {
	s := &Store{o}
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("open disk %s: %w", o.Device, err)
	}
	return s, nil
}

func (s *Store) check() error {
	if s.o.Device == "" {
		return fmt.Errorf("no path is given: %w", fs.ErrInvalid)
	}
	if !s.o.DisableGPT && len(s.o.Blobs) > 0 {
		return errors.New("there are offsets of blobs, and partitions are to be looked for")
	}
	abs, err := filepath.Abs(s.o.Device)
	if err != nil {
		return err
	}
	s.o.Device = abs
	f, size, err := open(abs)
	if err != nil {
		return err
	}
	defer f.Close()
	for d, e := range s.o.Blobs {
		if err := backend.CheckRange(e.Off, e.Size, size); err != nil {
			return fmt.Errorf("blob %s: %w", d, err)
		}
	}
	if !s.o.DisableGPT {
		_, err = readTable(f, size)
	}
	return err
}

// Open finds the blob of ref on the disk as it is now. A disk that is exchanged later
// under the same name can still be read through the blob.
func (s *Store) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := ref.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("open blob %q: %w", ref.Digest, err)
	}
	b, err := s.open(ref)
	if err != nil {
		return nil, fmt.Errorf("open blob %s on disk %s: %w", ref.Digest, s.o.Device, err)
	}
	return b, nil
}

func (s *Store) open(ref backend.Ref) (*blob, error) {
	f, size, err := open(s.o.Device)
	if err != nil {
		return nil, err
	}
	e, err := s.find(f, size, ref)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &blob{f: f, at: e}, nil
}

// find returns where the blob of ref is on the disk f of size bytes.
func (s *Store) find(f *os.File, size int64, ref backend.Ref) (Extent, error) {
	var e Extent
	switch {
	case s.o.Blobs != nil:
		e, there := s.o.Blobs[ref.Digest]
		if !there {
			return e, fmt.Errorf("no offset is given for it: %w", fs.ErrNotExist)
		}
		if err := backend.CheckRange(e.Off, e.Size, size); err != nil {
			return e, err // the disk was exchanged
		}
		return e, backend.CheckSize(ref, e.Size)
	case s.o.DisableGPT:
		e = Extent{0, size}
	default:
		t, err := readTable(f, size)
		if err != nil {
			return e, err
		}
		p, err := t.find(ref.Digest.Encoded())
		if err != nil {
			return e, err
		}
		e = p.Extent
	}
	// The blob ends somewhere in the last sectors.
	switch {
	case ref.Size < 0:
		return e, fmt.Errorf("size %d is negative", ref.Size)
	case ref.Size > e.Size:
		return e, backend.CheckSize(ref, e.Size)
	case ref.Size > 0:
		e.Size = ref.Size
	}
	return e, nil
}

// open opens a disk. It looks before it opens, because opening another device can do
// something and opening a pipe can wait.
func open(name string) (*os.File, int64, error) {
	if st, err := os.Stat(name); err != nil {
		return nil, 0, err
	} else if !isDisk(st) {
		return nil, 0, notDisk(st)
	}
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !isDisk(st) {
		err = notDisk(st)
	}
	var size int64
	if err == nil {
		size, err = f.Seek(0, io.SeekEnd) // that of a device is not in st
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, size, nil
}

func isDisk(st fs.FileInfo) bool {
	return st.Mode().IsRegular() || st.Mode().Type() == fs.ModeDevice
}

func notDisk(st fs.FileInfo) error {
	return fmt.Errorf("it is neither a block device nor a regular file (%s): %w", st.Mode().Type(), fs.ErrInvalid)
}

type blob struct {
	f      *os.File
	at     Extent
	closed atomic.Bool
}

func (b *blob) Size() int64 { return b.at.Size }

func (b *blob) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.closed.Load() {
		return fmt.Errorf("read disk %s: %w", b.f.Name(), os.ErrClosed)
	}
	if err := backend.CheckRange(off, int64(len(p)), b.at.Size); err != nil {
		return fmt.Errorf("read disk %s: %w", b.f.Name(), err)
	}
	n, err := b.f.ReadAt(p, b.at.Off+off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		// Not wrapped: the disk will not grow by itself, so no second attempt.
		return fmt.Errorf("read disk %s: it ends at %d now, inside of a blob", b.f.Name(), b.at.Off+off+int64(n))
	}
	return err
}

func (b *blob) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	return b.f.Close()
}
