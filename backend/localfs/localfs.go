// Package localfs is a backend over a directory of blobs, each a regular file
// whose name is the hex digits of its digest: what nydus calls a blob directory.
//
// It never writes, follows no symbolic link and opens nothing but regular files.
// Read [Store] first. It holds no lock.
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

// Store is a [backend.Store] over a directory.
type Store struct{ dir string }

// New returns the store over dir, which must exist. It keeps no descriptor open.
func New(dir string) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open blob directory: %w", err)
	}
	st, err := os.Stat(abs)
	if err != nil {
		return nil, fmt.Errorf("open blob directory: %w", err)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("open blob directory: %s is not a directory", abs)
	}
	return &Store{abs}, nil
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
	f, size, err := open(filepath.Join(s.dir, ref.Digest.Encoded()))
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", ref.Digest, err)
	}
	if err := backend.CheckSize(ref, size); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", f.Name(), err), f.Close())
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
