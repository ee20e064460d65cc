package convert

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/erofsd/erofsd/erofs"
)

const (
	maxName    = 255  // bytes of one name, as every Linux file system has it
	maxTarget  = 4095 // bytes of a symlink's target
	maxDepth   = 1024 // directories above a path
	maxFollows = 40   // symlinks in one path, as the kernel counts
)

// limits bound what one image may make the converter keep in memory.
type limits struct {
	entries int64 // tar entries or directory entries, parents made up included
	meta    int64 // bytes of names, link targets and xattrs
	chunks  int64 // chunk references: 8 bytes each here and in the bootstrap
}

// defaultLimits are far above any real image and end in about 8 GiB.
var defaultLimits = limits{entries: 16 << 20, meta: 1 << 30, chunks: 32 << 20}

// A budget is what is left of limits.
type budget limits

func (b *budget) entry(n *erofs.Node, name string) error {
	if b.entries--; b.entries < 0 {
		return errors.New("image has too many entries")
	}
	b.meta -= int64(len(name))
	if n != nil {
		b.meta -= int64(len(n.Target))
		for _, x := range n.Xattrs {
			b.meta -= int64(len(x.Name) + len(x.Value))
		}
	}
	if b.meta < 0 {
		return errors.New("names, link targets and xattrs of the image are too large together")
	}
	return nil
}

// file takes the chunk references of a file of size bytes.
func (b *budget) file(size, chunkSize int64) error {
	n := size / chunkSize
	if size%chunkSize != 0 {
		n++
	}
	if size < 0 || n > b.chunks {
		return fmt.Errorf("file of %d bytes has too many chunks of %d: choose a larger chunk size", size, chunkSize)
	}
	b.chunks -= n
	return nil
}

// A layer is one tar as an overlay on the tree below it, with OCI's rules:
// whiteouts in any order, which only affect the tree below; the last of several
// entries of a path wins, but directories keep what is in them; a directory
// that is only mentioned as a parent does not replace the attributes below.
//
// Not safe for concurrent use.
type layer struct {
	lower   *erofs.Node // the merged tree below; unchanged until merge
	root    *entry
	pending []*entry // hard links whose target has not come yet
	budget  *budget
}

// An entry is one inode of a layer; hard links share it.
type entry struct {
	node      *erofs.Node // attributes; nil while a hard link is pending
	children  map[string]*entry
	whiteouts map[string]struct{} // names that are removed from the tree below
	opaque    bool                // nothing of the tree below is left here
	implicit  bool                // a directory that is only mentioned as a parent
	target    string              // of a pending hard link
	visited   bool                // by resolve
}

func newLayer(lower *erofs.Node, b *budget) *layer {
	return &layer{lower: lower, root: implicitDir(), budget: b}
}

// emptyDir is the attributes of a directory that no layer describes.
func emptyDir() *erofs.Node { return &erofs.Node{Mode: syscall.S_IFDIR | 0o755} }

func implicitDir() *entry { return &entry{node: emptyDir(), implicit: true} }

func isDir(n *erofs.Node) bool { return n != nil && n.Mode&syscall.S_IFMT == syscall.S_IFDIR }

func isLink(n *erofs.Node) bool { return n != nil && n.Mode&syscall.S_IFMT == syscall.S_IFLNK }

func (e *entry) dir() bool { return e != nil && isDir(e.node) }

func (e *entry) set(name string, child *entry) {
	if e.children == nil {
		e.children = make(map[string]*entry)
	}
	e.children[name] = child
}

// A place is a path as the layer and the tree below it have it; either may be
// nil, both when the path does not exist.
type place struct {
	up  *entry
	low *erofs.Node
}

func (p place) dir() bool { return p.up.dir() || p.up == nil && isDir(p.low) }

func (p place) link() (target string, ok bool) {
	switch {
	case p.up != nil && isLink(p.up.node):
		return p.up.node.Target, true
	case p.up == nil && isLink(p.low):
		return p.low.Target, true
	}
	return "", false
}

// child is name in the directory p, as far as the layer is known.
func (p place) child(name string) place {
	var c place
	if p.up != nil {
		c.up = p.up.children[name]
		if _, gone := p.up.whiteouts[name]; gone || p.up.opaque {
			return c
		}
	}
	if p.low != nil {
		c.low = p.low.Children[name]
	}
	if c.up != nil && !(c.up.dir() && isDir(c.low)) {
		c.low = nil
	}
	return c
}

// walk goes to the directory name. It follows symlinks on the way, in the layer
// and below it, but never out of the root: "lib/x" on top of "lib -> usr/lib" is
// usr/lib/x, as when a runtime unpacks the layers one over the other. What is
// missing is made (implicit directories) or, without create, is a zero place.
func (l *layer) walk(name string, create bool) (place, error) {
	stack := []place{{l.root, l.lower}}
	todo := strings.Split(name, "/")
	for follows := 0; len(todo) > 0; {
		d, next := stack[len(stack)-1], todo[0]
		todo = todo[1:]
		switch next {
		case "", ".":
			continue
		case "..": // of a symlink: splitPath refuses it in entries
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		c := d.child(next)
		if target, ok := c.link(); ok {
			if follows++; follows > maxFollows {
				return place{}, fmt.Errorf("too many symlinks on the way to %q", name)
			}
			if strings.HasPrefix(target, "/") {
				stack = stack[:1]
			}
			todo = append(strings.Split(target, "/"), todo...)
			continue
		}
		switch {
		case !create && !c.dir():
			return place{}, nil
		case create && !c.up.dir():
			if len(next) > maxName || len(stack) >= maxDepth {
				return place{}, fmt.Errorf("symlink on the way to %q leads too deep", name)
			}
			if err := l.budget.entry(nil, next); err != nil {
				return place{}, err
			}
			replaced := c.up != nil
			c.up = implicitDir()
			c.up.opaque, c.up.implicit = replaced, !replaced
			if replaced || !isDir(c.low) {
				c.low = nil
			}
			d.up.set(next, c.up)
		}
		stack = append(stack, c)
	}
	return stack[len(stack)-1], nil
}

// add puts n at name, a path that splitPath made.
func (l *layer) add(name string, n *erofs.Node) error {
	if err := l.budget.entry(n, name); err != nil {
		return err
	}
	if name == "." {
		if !isDir(n) {
			return errors.New("the root is not a directory")
		}
		l.root.node, l.root.implicit = n, false
		return nil
	}
	dir, base := path.Split(name)
	d, err := l.walk(dir, true)
	if err != nil {
		return err
	}
	old := d.up.children[base]
	if old.dir() && isDir(n) {
		old.node, old.implicit = n, false
		return nil
	}
	// What the layer itself has replaced, it has also taken from below.
	d.up.set(base, &entry{node: n, opaque: old != nil && isDir(n)})
	return nil
}

// link makes name a hard link to target: to what the layer has there by now,
// else to what the tree below has, else to what the layer brings later.
func (l *layer) link(name, target string) error {
	if err := l.budget.entry(nil, name+target); err != nil {
		return err
	}
	dir, base := path.Split(name)
	if name == "." {
		return errors.New("the root is not a directory")
	}
	to, err := l.lookup(target)
	if err != nil {
		return err
	}
	if to == nil {
		to = &entry{target: target}
		l.pending = append(l.pending, to)
	} else if to.dir() {
		return fmt.Errorf("hard link to the directory %q", target)
	}
	d, err := l.walk(dir, true)
	if err != nil {
		return err
	}
	d.up.set(base, to)
	return nil
}

// lookup returns the entry at name without following a symlink there, nil when
// there is none.
func (l *layer) lookup(name string) (*entry, error) {
	if name == "." {
		return l.root, nil
	}
	dir, base := path.Split(name)
	d, err := l.walk(dir, false)
	if err != nil {
		return nil, err
	}
	c := d.child(base)
	if c.up == nil && c.low == nil && d.low != nil {
		// A whiteout takes the name away, not the inode: tars order the two freely.
		c.low = d.low.Children[base]
	}
	if c.up == nil && c.low != nil {
		return &entry{node: c.low}, nil
	}
	return c.up, nil
}

// remove whites out name in the tree below.
func (l *layer) remove(dir, name string) error {
	if err := l.budget.entry(nil, name); err != nil {
		return err
	}
	d, err := l.walk(dir, true)
	if err != nil {
		return err
	}
	if d.up.whiteouts == nil {
		d.up.whiteouts = make(map[string]struct{})
	}
	d.up.whiteouts[name] = struct{}{}
	return nil
}

// clear makes dir opaque: nothing of it in the tree below is left.
func (l *layer) clear(dir string) error {
	if err := l.budget.entry(nil, ""); err != nil {
		return err
	}
	d, err := l.walk(dir, true)
	if err == nil {
		d.up.opaque = true
	}
	return err
}

// merge ends the layer: it lays it over the tree below, changing that tree in
// place, and returns it.
func (l *layer) merge() (*erofs.Node, error) {
	if err := l.resolve(); err != nil {
		return nil, err
	}
	mergeDir(l.lower, l.root)
	return l.lower, nil
}

// resolve finds the targets of the hard links that came before them.
func (l *layer) resolve() error {
	for _, e := range l.pending {
		var chain []*entry
		for e.node == nil {
			if e.visited {
				return fmt.Errorf("hard links to %q lead in a circle", e.target)
			}
			e.visited = true
			chain = append(chain, e)
			to, err := l.lookup(e.target)
			switch {
			case err != nil:
				return fmt.Errorf("hard link to %q: %w", e.target, err)
			case to == nil:
				return fmt.Errorf("hard link to %q: neither this layer nor one below has it", e.target)
			case to.dir():
				return fmt.Errorf("hard link to the directory %q", e.target)
			}
			e = to
		}
		for _, c := range chain {
			c.node = e.node
		}
	}
	return nil
}

func mergeDir(low *erofs.Node, up *entry) {
	if up.opaque {
		low.Children = nil
	}
	for name := range up.whiteouts {
		delete(low.Children, name)
	}
	if !up.implicit {
		children := low.Children
		*low = *up.node
		low.Children = children
	}
	if low.Children == nil && len(up.children) > 0 {
		low.Children = make(map[string]*erofs.Node, len(up.children))
	}
	for name, u := range up.children {
		if !u.dir() {
			low.Children[name] = u.node
			continue
		}
		l := low.Children[name]
		if !isDir(l) {
			l = emptyDir()
			low.Children[name] = l
		}
		mergeDir(l, u)
	}
}

// splitPath cleans the path of a tar entry: relative to the root, without "."
// and empty parts, "." for the root itself. It refuses what could lead out.
func splitPath(name string) (string, error) {
	if name == "" {
		return "", errors.New("entry without a name")
	}
	parts := strings.Split(name, "/")
	parts = slices.DeleteFunc(parts, func(s string) bool { return s == "" || s == "." })
	if len(parts) == 0 {
		return ".", nil
	}
	if len(parts) > maxDepth {
		return "", fmt.Errorf("%.100q...: more than %d directories deep", name, maxDepth)
	}
	for _, p := range parts {
		switch {
		case p == "..":
			return "", fmt.Errorf("%.200q leads out of the image", name)
		case len(strings.TrimPrefix(p, whiteout)) > maxName: // the longest name has a whiteout, too
			return "", fmt.Errorf("%.100q...: name of %d bytes, at most %d are possible", p, len(p), maxName)
		case strings.IndexByte(p, 0) >= 0:
			return "", fmt.Errorf("%.200q: name with a zero byte", name)
		}
	}
	return strings.Join(parts, "/"), nil
}
