package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api"
)

// maxPrefetchFiles bounds a list of files to fetch.
const maxPrefetchFiles = 1 << 16

// A listed run belongs to the entry of a list with number rank.
type listedRun struct {
	rank int
	blobmgr.File
}

// listed returns the chunks of what a list names, a directory with all below, by blob and
// in the order of the list. rank gives an entry's number, or -1.
func listed(m *erofs.Image, blobs int, rank func(name string, nid uint64) int) ([][]blobmgr.File, error) {
	runs := make([][]listedRun, blobs)
	dirs := map[string]int{} // those that are listed, or below one that is
	err := m.Walk(func(name string, n erofs.Inode) error {
		r := rank(name, n.NID)
		if above, ok := dirs[path.Dir(name)]; ok && name != "." && (r < 0 || above < r) {
			r = above
		}
		switch {
		case r < 0:
			return nil
		case n.IsDir():
			dirs[name] = r
			return nil
		case !n.IsRegular():
			return nil
		}
		return fileRuns(m, n, func(blob int, f blobmgr.File) { runs[blob] = append(runs[blob], listedRun{r, f}) })
	})
	if err != nil {
		return nil, err
	}
	out := make([][]blobmgr.File, blobs)
	for i, list := range runs {
		slices.SortStableFunc(list, func(a, b listedRun) int { return cmp.Compare(a.rank, b.rank) })
		for _, r := range list {
			out[i] = append(out[i], r.File)
		}
	}
	return out, nil
}

// byName ranks paths as people write them.
func byName(names []string) func(string, uint64) int {
	ranks := map[string]int{}
	for i, name := range names {
		name = cmp.Or(strings.Trim(path.Clean("/"+strings.TrimSpace(name)), "/"), ".")
		if _, again := ranks[name]; !again {
			ranks[name] = i
		}
	}
	return func(name string, _ uint64) int {
		if r, ok := ranks[name]; ok {
			return r
		}
		return -1
	}
}

// byNID ranks inodes.
func byNID(nids []uint64) func(string, uint64) int {
	ranks := map[uint64]int{}
	for i, nid := range nids {
		if _, again := ranks[nid]; !again {
			ranks[nid] = i
		}
	}
	return func(_ string, nid uint64) int {
		if r, ok := ranks[nid]; ok {
			return r
		}
		return -1
	}
}

// fetchListed fetches a list's files of img behind what readers want, until img is closed.
func (d *Daemon) fetchListed(img *image, runs [][]blobmgr.File) {
	ctx, cancel := context.WithCancel(d.ctx)
	defer cancel()
	done := make(chan struct{})
	defer close(done)
	d.background.Go(func() {
		select {
		case <-img.closed:
			cancel()
		case <-done:
		}
	})
	for i, v := range img.devices {
		if err := v.blob.Fetch(ctx, runs[i]); err != nil {
			return // img is closed, or the daemon ends
		}
	}
}

// fetchTable fetches what m's own prefetch table names, unless that is everything.
func (d *Daemon) fetchTable(img *image, m *erofs.Image) {
	nids := m.Prefetch()
	if len(nids) == 0 || slices.Contains(nids, m.Root()) {
		return
	}
	runs, err := listed(m, len(img.devices), byNID(nids))
	if err != nil {
		if !img.isClosed() {
			d.log.Warn("no prefetch by the image's table", "image", img.key.id, "err", err)
		}
		return
	}
	d.fetchListed(img, runs)
}

// Prefetch has files of an open image fetched in the background, in their order;
// directories with all below. It does not wait for them.
func (d *Daemon) Prefetch(ctx context.Context, r api.PrefetchRequest) error {
	if len(r.Files) == 0 || len(r.Files) > maxPrefetchFiles {
		return api.BadRequest(fmt.Errorf("prefetch: want 1 to %d files or directories, / for everything", maxPrefetchFiles))
	}
	key := imageKey{ownDomain(r.DomainID), r.Image}
	d.mu.Lock()
	img := d.images[key]
	d.mu.Unlock()
	if img == nil {
		return api.NotFound(fmt.Errorf("prefetch of image %s: it is not mounted (see erofsctl status)", key))
	}
	if err := d.prefetch(ctx, img, r.Files); err != nil {
		return fmt.Errorf("prefetch of image %s: %w", key, err)
	}
	return nil
}

// prefetch starts to fetch files of img. It ends with img.
func (d *Daemon) prefetch(ctx context.Context, img *image, files []string) error {
	select {
	case <-img.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	if img.err != nil {
		return img.err
	}
	m, _, err := openImage(ctx, img.boot)
	if err != nil {
		return err
	}
	runs, err := listed(m, len(img.devices), byName(files))
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(runs, func(list []blobmgr.File) bool { return len(list) > 0 }) {
		return api.NotFound(errors.New("none of the files is in the image, or they are all empty"))
	}
	d.background.Go(func() { d.fetchListed(img, runs) })
	return nil
}
