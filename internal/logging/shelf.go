package logging

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	zipped  = ".gz"
	partial = ".gz.tmp" // while it is written
)

// A shelf keeps rotated files: it compresses them and removes the oldest, in a goroutine
// of its own. It touches only files that are named like rotated ones.
type shelf struct {
	stem, ext string
	keep      int
	warn      func(error)
	kick      chan struct{}
	quit      chan struct{}
	done      chan struct{}
}

func newShelf(stem, ext string, keep int, warn func(error)) *shelf {
	s := &shelf{stem: stem, ext: ext, keep: keep, warn: warn, kick: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{})}
	s.wake() // for what an earlier process left
	go s.run()
	return s
}

// wake tells of a new file. It does not wait.
func (s *shelf) wake() {
	select {
	case s.kick <- struct{}{}:
	default: // it is told already
	}
}

// close ends the work. What is not compressed will be at the next start.
func (s *shelf) close() {
	close(s.quit)
	<-s.done
}

func (s *shelf) run() {
	defer close(s.done)
	for {
		select {
		case <-s.quit:
			return
		case <-s.kick:
		}
		if err := s.tidy(); err != nil && !errors.Is(err, os.ErrClosed) {
			s.warn(err)
		}
	}
}

// tidy removes what is too much, then compresses what is not yet, the newest first: the
// oldest may be gone before it is their turn.
func (s *shelf) tidy() error {
	names, err := s.rotated()
	if err != nil {
		return err
	}
	var errs []error
	for len(names) > s.keep {
		errs = append(errs, os.Remove(names[0]))
		names = names[1:]
	}
	for _, name := range slices.Backward(names) {
		if !strings.HasSuffix(name, zipped) {
			errs = append(errs, s.compress(name))
		}
	}
	return errors.Join(errs...)
}

// rotated lists the rotated files, the oldest first, and removes halves that an earlier
// process left.
func (s *shelf) rotated() ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(s.stem))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), filepath.Base(s.stem))
		if !ours || len(rest) < len(rotatedFormat) || !e.Type().IsRegular() {
			continue
		}
		if _, err := time.Parse(rotatedFormat, rest[:len(rotatedFormat)]); err != nil {
			continue
		}
		name := filepath.Join(filepath.Dir(s.stem), e.Name())
		switch {
		case strings.HasSuffix(name, s.ext+partial):
			err = os.Remove(name)
		case strings.HasSuffix(name, s.ext), strings.HasSuffix(name, s.ext+zipped):
			names = append(names, name)
		}
		if err != nil {
			return nil, err
		}
	}
	return names, nil // ReadDir sorts by name, which is by age
}

// compress replaces a file by its compressed form. On an error it stays as it is.
func (s *shelf) compress(name string) (err error) {
	in, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(name+partial, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	zip := gzip.NewWriter(out)
	_, err = io.Copy(zip, reader{s.quit, in})
	err = errors.Join(err, zip.Close(), out.Close())
	if err == nil {
		err = os.Rename(name+partial, name+zipped)
	}
	if err != nil {
		return fmt.Errorf("compress %s: %w", name, errors.Join(err, os.Remove(name+partial)))
	}
	return os.Remove(name)
}

// reader ends with os.ErrClosed when quit is closed.
type reader struct {
	quit <-chan struct{}
	r    io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	select {
	case <-r.quit:
		return 0, os.ErrClosed
	default:
		return r.r.Read(p)
	}
}
