package cachefilestest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Export writes what is on disk below dir, where a real kernel has it in its cache root: a
// sparse file for each object that was closed once.
func (k *Kernel) Export(dir string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, c := range k.disk {
		name := filepath.Join(dir, key.Path())
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), c.export(name)); err != nil {
			return fmt.Errorf("export %s: %w", key.Cookie, err)
		}
	}
	return nil
}

func (c *content) export(name string) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for end := int64(0); end < c.size; {
		off, err := unix.Seek(int(c.f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return err
		}
		if end, err = unix.Seek(int(c.f.Fd()), off, unix.SEEK_HOLE); err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(f, off), io.NewSectionReader(c.f, off, end-off)); err != nil {
			return err
		}
	}
	return f.Truncate(c.size)
}
