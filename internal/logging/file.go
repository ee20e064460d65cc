package logging

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// current is what the live file is called when it is rotated; flexi_logger's name,
	// which those who collect nydusd's logs know.
	current = "_rCURRENT"
	// rotatedFormat is the time in the name of a rotated file, UTC: names sort by age.
	rotatedFormat = "_r2006-01-02_15-04-05"
	// sameSecond is the number of files that may be rotated in one second.
	sameSecond = 10000
)

// A file is the sink that appends to a file and begins a new one by size.
type file struct {
	stem  string // path without extension
	ext   string // with its dot
	limit int64  // bytes; 0: no rotation
	shelf *shelf // nil without rotation

	// The next rotated file's name: a number that was used in a second is not used again,
	// and time does not go back, so that names stay in the order of age.
	second string
	next   int
	stuck  bool // the last rotation did not work, and that was told

	f    *os.File // nil: opening it again did not work yet
	info fs.FileInfo
	size int64
}

// openFile opens the file of o, and makes its directory. warn is told of rotated files
// that cannot be compressed or removed.
func openFile(o Options, warn func(error)) (*file, error) {
	name, err := filepath.Abs(o.File)
	if err != nil {
		return nil, fmt.Errorf("open log file: %w", err)
	}
	ext := filepath.Ext(name)
	f := &file{stem: strings.TrimSuffix(name, ext), ext: ext, limit: o.RotationSize}
	if ext == "" {
		f.ext = ".log"
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, fmt.Errorf("open log file: %w", err)
	}
	if err := f.open(); err != nil {
		return nil, fmt.Errorf("open log file: %w", err)
	}
	if f.limit > 0 {
		if o.Keep <= 0 {
			o.Keep = 10
		}
		f.shelf = newShelf(f.stem, f.ext, o.Keep, warn)
	}
	return f, nil
}

// live is the path of the file that is written.
func (f *file) live() string {
	if f.limit > 0 {
		return f.stem + current + f.ext
	}
	return f.stem + f.ext
}

func (f *file) open() error {
	file, err := os.OpenFile(f.live(), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return errors.Join(err, file.Close())
	}
	f.f, f.info, f.size = file, info, info.Size()
	return nil
}

// write appends a line; a part of one that did not fit is taken back.
func (f *file) write(line []byte) error {
	if err := f.ready(int64(len(line))); err != nil {
		return err
	}
	n, err := f.f.Write(line)
	if err != nil && n > 0 {
		err = errors.Join(err, f.f.Truncate(f.size))
	}
	if err == nil {
		f.size += int64(n)
	}
	return err
}

// ready sees to it that n bytes can go to the live file: it opens it again when somebody
// has moved it, and begins a new one when it is full.
func (f *file) ready(n int64) error {
	if f.f != nil {
		if info, err := os.Stat(f.live()); err != nil || !os.SameFile(info, f.info) {
			f.forget()
		}
	}
	if f.f != nil && f.limit > 0 && f.size > 0 && f.size+n > f.limit {
		err := f.rotate()
		if err != nil && !f.stuck {
			f.shelf.warn(err) // and go on with the file that there is
		}
		f.stuck = err != nil
	}
	if f.f == nil {
		return f.open()
	}
	return nil
}

// forget closes the file. Every byte was written, so its error says nothing.
func (f *file) forget() {
	_ = f.f.Close()
	f.f = nil
}

func (f *file) rotate() error {
	if now := time.Now().UTC().Format(rotatedFormat); now > f.second {
		f.second, f.next = now, 0
	}
	for f.next < sameSecond {
		name := f.stem + f.second
		if f.next > 0 {
			name += fmt.Sprintf(".restart-%04d", f.next)
		}
		f.next++
		if exists(name+f.ext) || exists(name+f.ext+zipped) {
			continue
		}
		if err := os.Rename(f.live(), name+f.ext); err != nil {
			return fmt.Errorf("rotate log file: %w", err)
		}
		f.forget()
		f.shelf.wake()
		return nil
	}
	return fmt.Errorf("rotate log file: %d files of one second: %w", sameSecond, fs.ErrExist)
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

func (f *file) close() error {
	if f.shelf != nil {
		f.shelf.close()
	}
	if f.f == nil {
		return nil
	}
	return f.f.Close()
}
