package harness

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// DropFile writes a file back and drops its pages from the page cache.
func DropFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fdatasync(int(f.Fd())); err != nil && err != unix.EINVAL && err != unix.EROFS {
		return fmt.Errorf("write back %s: %w", name, err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("drop pages of %s: %w", name, err)
	}
	return nil
}

// DropTree drops the pages of every regular file below dir, on one file system.
// Names and attributes stay cached.
func DropTree(dir string) error {
	return walkFiles(dir, DropFile)
}

// ResidentBytes returns how much of the regular files below dir is in the page
// cache (cachestat(2), Linux 6.5).
func ResidentBytes(dir string) (int64, error) {
	var pages uint64
	err := walkFiles(dir, func(name string) error {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		var stat unix.Cachestat_t
		if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0); err != nil {
			return fmt.Errorf("cachestat %s: %w", name, err)
		}
		pages += stat.Cache
		return nil
	})
	return int64(pages) * int64(os.Getpagesize()), err
}

func walkFiles(dir string, do func(name string) error) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return do(name)
	})
}
