package blobmgr

import "slices"

// How far a miss that continues nothing makes us look around it, in stored bytes.
// The figures are from the traces of starting programs behind a link of 100 Mbit/s
// and 20 ms (docs/design.md, Readahead).
const (
	// wholeFile is the largest file that is fetched whole when it is first missed: most
	// libraries are read nearly whole, with one wait for each window that is not there.
	wholeFile = 2 << 20
	// fileWindow is fetched behind the first miss in a larger file; it doubles with
	// each further one, up to maxAround.
	fileWindow = 384 << 10
	// fileTail is fetched from the end of a larger file when its start is missed:
	// programs and libraries have there what the loader wants next.
	fileTail = 256 << 10
	// smallFile is the largest file whose neighbours in its directory are fetched, and
	// smallNeighbour the largest of these. How much of them starts with dirWindow and
	// doubles with each miss in the directory: modules of a package are read together,
	// the files of a directory of programs are not.
	smallFile      = 128 << 10
	smallNeighbour = 64 << 10
	dirWindow      = 32 << 10
	maxAround      = 1 << 20
	// maxLook bounds the files of a directory that are looked at for one miss.
	maxLook = 4096
)

// A File tells where a regular file of an image lies in a blob: it is a hint for
// the readahead and decides nothing else.
type File struct {
	First, Last int // chunks, Last exclusive
	Dir         int // number of its directory: equal for files of the same one
}

// Hint tells b which files it holds, in any order. Hints outside of the blob are
// ignored; those of the last call count.
func (b *Blob) Hint(files []File) { b.ahead.hint(newLocality(b, files)) }

// A locality is the files of a blob in the order of their units.
type locality struct {
	files []fileRun
	dirs  map[int32][]int32 // positions in files, ascending
}

type fileRun struct {
	first, last int32 // units
	dir         int32
	misses      uint8 // in it
}

func newLocality(b *Blob, files []File) *locality {
	l := &locality{dirs: make(map[int32][]int32)}
	for _, f := range files {
		if f.First < 0 || f.First >= f.Last || f.Last > b.table.Len() {
			continue
		}
		first, last := b.table.UnitOf(f.First), b.table.UnitOf(f.Last-1)+1
		l.files = append(l.files, fileRun{first: int32(first), last: int32(last), dir: int32(f.Dir)})
	}
	slices.SortFunc(l.files, func(a, b fileRun) int { return int(a.first) - int(b.first) })
	for i, f := range l.files {
		l.dirs[f.dir] = append(l.dirs[f.dir], int32(i))
	}
	return l
}

// find returns the position of the file that holds unit u, -1 if none is known to.
func (l *locality) find(u int) int {
	i, found := slices.BinarySearchFunc(l.files, u, func(f fileRun, u int) int { return int(f.first) - u })
	if !found {
		i--
	}
	if i < 0 || u >= int(l.files[i].last) {
		return -1
	}
	return i
}

// around returns what should be fetched after a miss of [first, last): runs of units,
// some of which may be present. The caller holds readahead.mu.
func (r *readahead) around(first, last int) []units {
	i := -1
	if r.near != nil {
		i = r.near.find(first)
	}
	if i < 0 {
		return []units{r.forward(last, r.b.table.Units(), r.first)}
	}
	f := &r.near.files[i]
	size := r.bytes(int(f.first), int(f.last))
	runs := r.inFile(f, size, first, last)
	if size <= smallFile {
		runs = append(runs, r.inDir(i)...)
	}
	f.misses = min(f.misses+1, 8)
	return runs
}

// inFile returns what to fetch of the file f of size stored bytes.
func (r *readahead) inFile(f *fileRun, size int64, first, last int) []units {
	if size <= wholeFile {
		return []units{{int(f.first), int(f.last)}}
	}
	runs := []units{r.forward(last, int(f.last), min(int64(fileWindow)<<f.misses, maxAround))}
	if first == int(f.first) && f.misses == 0 {
		tail := units{int(f.last), int(f.last)}
		for n := int64(0); tail.first > last; tail.first-- {
			if n += r.b.table.Unit(tail.first - 1).CLen; n > fileTail {
				break
			}
		}
		runs = append(runs, tail)
	}
	return runs
}

// inDir returns the absent small files in the directory of files[at], those behind it first.
func (r *readahead) inDir(at int) (runs []units) {
	l := r.near
	dir := l.files[at].dir
	files := l.dirs[dir]
	budget := min(int64(dirWindow)<<r.dirMisses[dir], maxAround)
	r.dirMisses[dir] = min(r.dirMisses[dir]+1, 8)
	here, _ := slices.BinarySearch(files, int32(at))
	look := func(i int32) bool {
		f := l.files[i]
		if r.b.present.all(int(f.first), int(f.last)) {
			return true
		}
		n := r.bytes(int(f.first), int(f.last))
		if n > smallNeighbour {
			return true
		}
		if budget -= n; budget < 0 {
			return false
		}
		runs = append(runs, units{int(f.first), int(f.last)})
		return true
	}
	looked := 0
	for _, i := range files[here+1:] {
		if looked++; looked > maxLook || !look(i) {
			return runs
		}
	}
	for _, i := range slices.Backward(files[:here]) {
		if looked++; looked > maxLook || !look(i) {
			return runs
		}
	}
	return runs
}

// forward returns the units from u on, up to end, that n stored bytes hold.
func (r *readahead) forward(u, end int, n int64) units {
	run := units{u, u}
	for run.last < end {
		if n -= r.b.table.Unit(run.last).CLen; n < 0 {
			break
		}
		run.last++
	}
	return run
}

// join sorts runs and joins those that touch.
func join(runs []units) []units {
	slices.SortFunc(runs, func(a, b units) int { return a.first - b.first })
	out := runs[:0]
	for _, x := range runs {
		switch {
		case x.first >= x.last:
		case len(out) > 0 && x.first <= out[len(out)-1].last:
			out[len(out)-1].last = max(out[len(out)-1].last, x.last)
		default:
			out = append(out, x)
		}
	}
	return out
}
