package erofs

import "fmt"

// maxDepth bounds how deep directories may be nested.
const maxDepth = 4096

// Walk calls f for every name of the image, the root first as ".", a directory
// before what it holds, its names sorted as on disk; paths have no leading slash.
// It stops at the first error, f's own included. A directory that is reached
// twice is an error, so Walk ends on every image.
func (m *Image) Walk(f func(path string, n Inode) error) error {
	n, err := m.Inode(m.Root())
	if err != nil {
		return fmt.Errorf("walk: %w", err)
	}
	if err := f(".", n); err != nil {
		return err
	}
	w := walker{m: m, f: f, seen: map[uint64]bool{n.NID: true}}
	return w.dir("", n, 0)
}

type walker struct {
	m    *Image
	f    func(path string, n Inode) error
	seen map[uint64]bool // directories
}

// dir walks what is below directory n; prefix is its path with a slash, or empty.
func (w *walker) dir(prefix string, n Inode, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("walk %s: %w", abbreviate(prefix), bad("more than %d directories deep", maxDepth))
	}
	for e, err := range w.m.ReadDir(n) {
		if err != nil {
			return fmt.Errorf("walk %s: %w", abbreviate(prefix), err)
		}
		if e.Name == "." || e.Name == ".." {
			continue
		}
		path := prefix + e.Name
		c, err := w.m.Inode(e.NID)
		if err != nil {
			return fmt.Errorf("walk %s: %w", abbreviate(path), err)
		}
		if err := w.f(path, c); err != nil {
			return err
		}
		if !c.IsDir() {
			continue
		}
		if w.seen[c.NID] {
			return fmt.Errorf("walk %s: %w", abbreviate(path), bad("directory %d has two names", c.NID))
		}
		w.seen[c.NID] = true
		if err := w.dir(path+"/", c, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// abbreviate shortens a path for a message and makes it one printable line.
func abbreviate(path string) string {
	const most = 256
	if path == "" {
		return "the root"
	}
	if len(path) > most {
		path = "..." + path[len(path)-most:]
	}
	return fmt.Sprintf("%q", path)
}
