package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/erofsd/erofsd/erofs"
)

const (
	whiteout   = ".wh."         // image-spec layer.md, Whiteouts
	opaque     = ".wh..wh..opq" // image-spec layer.md, Opaque Whiteout
	aufsPrefix = ".wh..wh."     // AUFS keeps its own files under such names
	paxXattr   = "SCHILY.xattr."
)

// A sink takes the content of regular files. It may keep n and complete
// n.Chunks later, until the layer is flushed.
type sink interface {
	file(ctx context.Context, n *erofs.Node, r io.Reader, size int64) error
}

// readTar reads the tar r into l and its file contents into s. Nothing of the
// tar is trusted.
func readTar(ctx context.Context, r io.Reader, l *layer, s sink) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := readEntry(ctx, h, tr, l, s); err != nil {
			return fmt.Errorf("tar entry %.200q: %w", h.Name, err)
		}
	}
}

func readEntry(ctx context.Context, h *tar.Header, r io.Reader, l *layer, s sink) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader, 'V': // comments and volume labels
		return nil
	}
	name, err := splitPath(h.Name)
	if err != nil {
		return err
	}
	if skip, err := readWhiteout(name, l); skip || err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		target, err := splitPath(h.Linkname)
		if err != nil {
			return fmt.Errorf("hard link: %w", err)
		}
		return l.link(name, target)
	}
	n, err := tarNode(h)
	if err != nil {
		return err
	}
	if n.Mode&syscall.S_IFMT == syscall.S_IFREG {
		if err := s.file(ctx, n, r, h.Size); err != nil {
			return err
		}
	}
	return l.add(name, n)
}

// readWhiteout handles names that start with ".wh.": none of them may be seen in
// the image. skip says that the entry is done with.
func readWhiteout(name string, l *layer) (skip bool, err error) {
	if !strings.Contains(name, whiteout) {
		return false, nil
	}
	dir, base := path.Split(name)
	for part := range strings.SplitSeq(dir, "/") {
		if strings.HasPrefix(part, aufsPrefix) {
			return true, nil
		}
		if strings.HasPrefix(part, whiteout) {
			return true, errors.New("below a whiteout")
		}
	}
	switch gone, ok := strings.CutPrefix(base, whiteout); {
	case !ok:
		return false, nil
	case base == opaque:
		return true, l.clear(dir)
	case strings.HasPrefix(base, aufsPrefix):
		return true, nil
	case gone == "" || gone == "." || gone == "..":
		return true, errors.New("whiteout of nothing")
	default:
		return true, l.remove(dir, gone)
	}
}

// tarNode is what h says about an inode. Numbers that the image cannot hold are
// errors: a uid that wraps around to 0 would be root's.
func tarNode(h *tar.Header) (*erofs.Node, error) {
	n := &erofs.Node{
		Mode: uint32(h.Mode & 0o7777),
		UID:  uint32(h.Uid),
		GID:  uint32(h.Gid),
		Sec:  h.ModTime.Unix(),
		Nsec: uint32(h.ModTime.Nanosecond()),
	}
	if int64(h.Uid) != int64(n.UID) || int64(h.Gid) != int64(n.GID) {
		return nil, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		n.Mode |= syscall.S_IFREG
		n.Size = h.Size
	case tar.TypeDir, 'D': // 'D': GNU tar's incremental archives
		n.Mode |= syscall.S_IFDIR
	case tar.TypeSymlink:
		n.Mode |= syscall.S_IFLNK
		n.Target = h.Linkname
		if err := checkTarget(n.Target); err != nil {
			return nil, err
		}
	case tar.TypeChar, tar.TypeBlock:
		n.Mode |= syscall.S_IFCHR
		if h.Typeflag == tar.TypeBlock {
			n.Mode = n.Mode&^syscall.S_IFMT | syscall.S_IFBLK
		}
		n.Major, n.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return nil, fmt.Errorf("device %d:%d is out of range", h.Devmajor, h.Devminor)
		}
	case tar.TypeFifo:
		n.Mode |= syscall.S_IFIFO
	default:
		return nil, fmt.Errorf("unknown entry type %q", h.Typeflag)
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, paxXattr); ok {
			n.Xattrs = append(n.Xattrs, erofs.Xattr{Name: name, Value: []byte(value)})
		}
	}
	return n, sortXattrs(n)
}

func checkTarget(target string) error {
	switch {
	case target == "":
		return errors.New("symlink without a target")
	case len(target) > maxTarget:
		return fmt.Errorf("symlink target of %d bytes, at most %d are possible", len(target), maxTarget)
	case strings.IndexByte(target, 0) >= 0:
		return errors.New("symlink target with a zero byte")
	}
	return nil
}

// sortXattrs puts the xattrs of n in the order of their names, checks them as
// the kernel would (XATTR_NAME_MAX; EROFS has 16 bits for a value's length) and
// leaves out those of other systems, which no Linux file system could take.
func sortXattrs(n *erofs.Node) error {
	n.Xattrs = slices.DeleteFunc(n.Xattrs, func(x erofs.Xattr) bool { return !linuxXattr(x.Name) })
	for _, x := range n.Xattrs {
		if len(x.Name) > maxName || len(x.Value) > math.MaxUint16 {
			return fmt.Errorf("xattr %.100q of %d bytes: name or value is too long", x.Name, len(x.Value))
		}
	}
	slices.SortFunc(n.Xattrs, func(a, b erofs.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

func linuxXattr(name string) bool {
	switch prefix, rest, _ := strings.Cut(name, "."); prefix {
	case "user", "trusted", "security":
		return rest != ""
	case "system":
		return rest == "posix_acl_access" || rest == "posix_acl_default"
	}
	return false
}
