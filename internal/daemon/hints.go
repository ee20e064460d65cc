package daemon

import (
	"errors"
	"path"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/erofs"
)

// errClosed ends a walk through an image that was closed meanwhile.
var errClosed = errors.New("image was closed")

// hint tells the blobs of img which files they hold, so that the readahead knows
// what lies around a read. It runs beside the first reads: nothing depends on it.
func (d *Daemon) hint(img *image, m *erofs.Image) {
	files := make([][]blobmgr.File, len(img.devices))
	dirs := map[string]int{}
	err := m.Walk(func(name string, n erofs.Inode) error {
		if img.isClosed() {
			return errClosed
		}
		if !n.IsRegular() {
			return nil
		}
		dir := path.Dir(name)
		if _, known := dirs[dir]; !known {
			dirs[dir] = len(dirs)
		}
		return fileRuns(m, n, func(blob int, f blobmgr.File) {
			f.Dir = dirs[dir]
			files[blob] = append(files[blob], f)
		})
	})
	if err != nil {
		if !img.isClosed() {
			d.log.Warn("no hints for the readahead", "image", img.key.id, "err", err)
		}
		return
	}
	for i, v := range img.devices {
		v.blob.Hint(files[i])
	}
}

// isOpen reports whether img has been opened.
func (img *image) isOpen() bool {
	select {
	case <-img.ready:
		return img.err == nil
	default:
		return false
	}
}

func (img *image) isClosed() bool {
	select {
	case <-img.closed:
		return true
	default:
		return false
	}
}

// fileRuns calls f for every run of chunks of n that lie together in a blob.
func fileRuns(m *erofs.Image, n erofs.Inode, f func(blob int, run blobmgr.File)) error {
	blob, run := -1, blobmgr.File{}
	for e, err := range m.Extents(n) {
		if err != nil {
			return err
		}
		if e.Device <= 0 {
			continue
		}
		c := int(e.Chunk)
		if e.Device-1 == blob && c == run.Last {
			run.Last++
			continue
		}
		if blob >= 0 {
			f(blob, run)
		}
		blob, run = e.Device-1, blobmgr.File{First: c, Last: c + 1}
	}
	if blob >= 0 {
		f(blob, run)
	}
	return nil
}
