package cachefiles

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const pageSize = 4096

// script is a kernel whose files answer writes and seeks as they are told.
type script struct {
	kernelCalls
	writes []func(n int) (int, error)       // one for each call, the last one for all further
	seeks  []func(off int64) (int64, error) // the same
	offs   []int64                          // of the writes
	lens   []int
}

func step[T any](s *[]T) T {
	f := (*s)[0]
	if len(*s) > 1 {
		*s = (*s)[1:]
	}
	return f
}

func (s *script) WriteAt(_ int, p []byte, off int64) (int, error) {
	s.offs, s.lens = append(s.offs, off), append(s.lens, len(p))
	return step(&s.writes)(len(p))
}

func (s *script) Seek(_ int, off int64, _ int) (int64, error) { return step(&s.seeks)(off) }

func scripted(t *testing.T, s *script) *File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "object"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &File{f: f, calls: s, dir: t.TempDir(), attach: 1500 * time.Millisecond}
}

func aligned(t *testing.T, pages int) []byte {
	t.Helper()
	p, free, err := AlignedBuffer(pages * pageSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(free)
	return p
}

func whole(n int) (int, error) { return n, nil }

func gives(n int, err error) func(int) (int, error) {
	return func(int) (int, error) { return n, err }
}

// Item 4, invariant 7: whatever a kernel of any age says, WriteAt goes on page by
// page, or says how far it came.
func TestWriteAt(t *testing.T) {
	for name, c := range map[string]struct {
		writes []func(int) (int, error)
		n      int
		err    error
		offs   []int64
	}{
		"whole":            {[]func(int) (int, error){whole}, 4 * pageSize, nil, []int64{0}},
		"short":            {[]func(int) (int, error){gives(pageSize, nil), whole}, 4 * pageSize, nil, []int64{0, 4096}},
		"short of a page":  {[]func(int) (int, error){gives(pageSize+512, nil), whole}, 4 * pageSize, nil, []int64{0, 4096}},
		"less than a page": {[]func(int) (int, error){gives(512, nil), whole}, 4 * pageSize, nil, []int64{0, 0}},
		"nothing":          {[]func(int) (int, error){gives(0, nil)}, 0, io.ErrShortWrite, []int64{0, 0, 0}},
		"nothing in between": {
			[]func(int) (int, error){gives(0, nil), gives(0, nil), gives(pageSize, nil), gives(0, nil), gives(0, nil), whole},
			4 * pageSize, nil,
			[]int64{0, 0, 0, 4096, 4096, 4096},
		},
		"oversized":           {[]func(int) (int, error){gives(64*pageSize, nil)}, 4 * pageSize, nil, []int64{0}},
		"interrupted":         {[]func(int) (int, error){gives(-1, unix.EINTR), whole}, 4 * pageSize, nil, []int64{0, 0}},
		"not attached yet":    {[]func(int) (int, error){gives(-1, unix.ENOBUFS), gives(-1, unix.ENOBUFS), whole}, 4 * pageSize, nil, []int64{0, 0, 0}},
		"EINVAL":              {[]func(int) (int, error){gives(-1, unix.EINVAL)}, 0, unix.EINVAL, []int64{0}},
		"ENOSPC":              {[]func(int) (int, error){gives(-1, unix.ENOSPC)}, 0, unix.ENOSPC, []int64{0}},
		"ENOSPC after a page": {[]func(int) (int, error){gives(pageSize, nil), gives(-1, unix.ENOSPC)}, pageSize, unix.ENOSPC, []int64{0, 4096}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &script{writes: c.writes}
			n, err := scripted(t, s).WriteAt(aligned(t, 4), 0)
			if n != c.n || !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Errorf("got %d, %v, want %d, %v", n, err, c.n, c.err)
			}
			if !slices.Equal(s.offs, c.offs) {
				t.Errorf("written at %v, want %v", s.offs, c.offs)
			}
			for i, off := range s.offs {
				if off+int64(s.lens[i]) != 4*pageSize {
					t.Errorf("write %d: %d bytes at %d", i, s.lens[i], off)
				}
			}
		})
	}
}

// Item 5: Linux 6.1 would put these bytes elsewhere.
func TestWriteAtRefusesUnaligned(t *testing.T) {
	p := aligned(t, 3)
	for name, c := range map[string]struct {
		p   []byte
		off int64
	}{
		"offset":          {p[:pageSize], 512},
		"negative offset": {p[:pageSize], -pageSize},
		"length":          {p[:pageSize+512], 0},
		"memory":          {p[512 : 512+pageSize], 0},
		"all":             {p[1:3], 5},
	} {
		s := &script{writes: []func(int) (int, error){whole}}
		if n, err := scripted(t, s).WriteAt(c.p, c.off); n != 0 || !errors.Is(err, ErrAlign) || s.offs != nil {
			t.Errorf("%s: %d, %v, written at %v", name, n, err, s.offs)
		}
	}
}

// ENOBUFS has three reasons, which statfs and time tell apart.
func TestWriteAtENOBUFS(t *testing.T) {
	never := func() *script { return &script{writes: []func(int) (int, error){gives(-1, unix.ENOBUFS)}} }
	p := aligned(t, 1)

	full := scripted(t, never())
	full.dir = "/proc" // no free blocks
	if _, err := full.WriteAt(p, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("without room: %v", err)
	}

	dead := scripted(t, never())
	begin := time.Now()
	if _, err := dead.WriteAt(p, 0); !errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOSPC) || errors.Is(err, ErrWithdrawn) {
		t.Errorf("with room: %v", err)
	}
	if took := time.Since(begin); took < dead.attach {
		t.Errorf("it took %v to give up, want at least the time a kernel needs", took)
	}

	gone := scripted(t, never())
	closed := make(chan struct{})
	close(closed)
	gone.gone = closed
	gone.attach = time.Hour
	if _, err := gone.WriteAt(p, 0); !errors.Is(err, unix.ENOBUFS) || !errors.Is(err, ErrWithdrawn) {
		t.Errorf("of a withdrawn file: %v", err)
	}
	gone.Close()
	if _, err := gone.WriteAt(p, 0); !errors.Is(err, os.ErrClosed) || !errors.Is(err, ErrWithdrawn) {
		t.Errorf("of a withdrawn file that is closed: %v", err)
	}

	lost := scripted(t, never())
	wait := time.AfterFunc(20*time.Millisecond, func() { lost.Close() })
	defer wait.Stop()
	if _, err := lost.WriteAt(p, 0); !errors.Is(err, os.ErrClosed) || errors.Is(err, ErrWithdrawn) {
		t.Errorf("of a file that is closed meanwhile: %v", err)
	}
}

func TestData(t *testing.T) {
	at := func(n int64, err error) func(int64) (int64, error) {
		return func(int64) (int64, error) { return n, err }
	}
	enxio := at(-1, unix.ENXIO)
	for name, c := range map[string]struct {
		seeks []func(int64) (int64, error)
		want  [][2]int64
		err   error
	}{
		"empty":            {[]func(int64) (int64, error){enxio}, nil, nil},
		"one run":          {[]func(int64) (int64, error){at(4096, nil), at(8192, nil), enxio}, [][2]int64{{4096, 8192}}, nil},
		"cut at size":      {[]func(int64) (int64, error){at(4096, nil), at(1<<40, nil)}, [][2]int64{{4096, 65536}}, nil},
		"begins past size": {[]func(int64) (int64, error){at(65536, nil)}, nil, nil},
		"not attached yet": {[]func(int64) (int64, error){at(-1, unix.ENOBUFS), at(0, nil), at(-1, unix.ENOBUFS), at(4096, nil), enxio}, [][2]int64{{0, 4096}}, nil},
		"error":            {[]func(int64) (int64, error){at(-1, unix.EIO)}, nil, unix.EIO},
		"no progress":      {[]func(int64) (int64, error){at(0, nil)}, nil, errNoProgress},
	} {
		var got [][2]int64
		s := &script{seeks: c.seeks}
		err := scripted(t, s).Data(65536, func(off, end int64) { got = append(got, [2]int64{off, end}) })
		if !slices.Equal(got, c.want) || !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("%s: got %v, %v, want %v, %v", name, got, err, c.want, c.err)
		}
	}
}
