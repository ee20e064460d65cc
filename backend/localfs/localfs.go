// Package localfs is a backend over directories of blobs, each a regular file whose name
// is the hex digits of its digest (what nydus calls a blob directory), or over one file
// that is the blob of whoever asks.
//
// It never writes, follows no symbolic link in a directory of blobs and opens nothing but
// regular files. Read [Options] first. It holds no lock.
package localfs

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

	"github.com/erofsd/erofsd/backend"
)

// Options say where the blobs are. Either BlobFile or Dir is needed.
type Options struct {
	// BlobFile is a file that is every blob asked for; the digests of chunks tell
	// whether it is the right one. It may be a symbolic link. With it, the
	// directories are not looked at.
	BlobFile string
	// Dir is a directory of blobs. It must exist.
	Dir string
	// AltDirs are more of them, asked in their order when Dir does not have the blob,
	// or not as it should be. One that is missing has no blobs.
	AltDirs []string
}

// Store is a [backend.Store] over files.
type Store struct {
	file string   // "": dirs
	dirs []string // in the order in which they are asked
}

// New returns the store over the directory dir, which must exist.
func New(dir string) (*Store, error) { return NewOptions(Options{Dir: dir}) }

// NewOptions returns the store over the files that o names. It keeps no descriptor open.
func NewOptions(o Options) (*Store, error) {
	switch {
	case o.BlobFile != "":
		return newFile(o.BlobFile)
	case o.Dir == "":
		return nil, fmt.Errorf("open blob directory: neither a directory nor a file is given: %w", fs.ErrInvalid)
	}
	s := &Store{}
	for _, dir := range append([]string{o.Dir}, o.AltDirs...) {
		if dir == "" {
			continue // not the working directory
		}
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, fmt.Errorf("open blob directory: %w", err)
		}
		s.dirs = append(s.dirs, abs)
	}
	st, err := os.Stat(s.dirs[0])
	if err != nil {
		return nil, fmt.Errorf("open blob directory: %w", err)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("open blob directory: %s is not a directory", s.dirs[0])
	}
	return s, nil
}

func newFile(name string) (*Store, error) {
	abs, err := filepath.Abs(name)
	if err != nil {
		return nil, fmt.Errorf("open blob file: %w", err)
	}
	st, err := os.Stat(abs)
	if err == nil && !st.Mode().IsRegular() {
		err = notRegular(abs, st)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob file: %w", err)
	}
	return &Store{file: abs}, nil
}

// Open opens the file of ref.Digest. A file that is deleted or replaced later can
// still be read through the blob.
func (s *Store) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// Only hex digits remain after this, so the name cannot leave the directory.
	if err := ref.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("open blob %q: %w", ref.Digest, err)
	}
	b, err := s.open(ref)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", ref.Digest, err)
	}
	return b, nil
}

func (s *Store) open(ref backend.Ref) (*blob, error) {
	if s.file != "" {
		name, err := filepath.EvalSymlinks(s.file)
		if err != nil {
			return nil, err
		}
		return openSized(name, ref)
	}
	var missing, wrong error
	for _, dir := range s.dirs {
		b, err := openSized(filepath.Join(dir, ref.Digest.Encoded()), ref)
		switch {
		case err == nil:
			return b, nil
		case errors.Is(err, fs.ErrNotExist):
			missing = errors.Join(missing, err)
		default:
			wrong = errors.Join(wrong, err)
		}
	}
	if wrong != nil {
		return nil, wrong // tells more than that other directories do not have it
	}
	return nil, missing
}

func openSized(name string, ref backend.Ref) (*blob, error) {
	f, size, err := open(name)
	if err != nil {
		return nil, err
	}
	if err := backend.CheckSize(ref, size); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return &blob{f: f, size: size}, nil
}

// open opens a regular file. It looks before it opens, because opening a device
// can do something and opening a pipe can wait.
func open(name string) (*os.File, int64, error) {
	if st, err := os.Lstat(name); err != nil {
		return nil, 0, err
	} else if !st.Mode().IsRegular() {
		return nil, 0, notRegular(name, st)
	}
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = notRegular(name, st)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size(), nil
}

func notRegular(name string, st fs.FileInfo) error {
	return fmt.Errorf("%s is not a regular file (%s): put the blob itself there: %w", name, st.Mode().Type(), fs.ErrInvalid)
}

type blob struct {
	f      *os.File
	size   int64
	closed atomic.Bool
}

func (b *blob) Size() int64 { return b.size }

func (b *blob) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.closed.Load() {
		return fmt.Errorf("read %s: %w", b.f.Name(), os.ErrClosed)
	}
	if err := backend.CheckRange(off, int64(len(p)), b.size); err != nil {
		return fmt.Errorf("read %s: %w", b.f.Name(), err)
	}
	n, err := b.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		// Not wrapped: the file will not grow by itself, so no second attempt.
		return fmt.Errorf("read %s: it had %d bytes when it was opened and ends at %d now: restore the file", b.f.Name(), b.size, off+int64(n))
	}
	return err
}

func (b *blob) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	return b.f.Close()
}
