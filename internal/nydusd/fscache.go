package nydusd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
)

// fscache is the way of a nydusd that answers for the kernel's cache.
type fscache struct {
	*parts
	pid int // 0: not known
}

func (*fscache) name() string { return "nydusd fscache" }

// sourceOf is what the table of mounts shows of an image, by its domain.
func sourceOf(domain string) string { return "nydusd:" + domain }

func (*fscache) mounted(i image, all []mountinfo.Info) (list []mountinfo.Info) {
	for _, m := range all {
		if m.FSType == "erofs" && m.Source == sourceOf(i.Domain) {
			list = append(list, m)
		}
	}
	return list
}

// serves asks whether nydusd counts what it does for the image: it does from the moment that
// the kernel opened it.
func (f *fscache) serves(ctx context.Context, i image) (bool, error) {
	_, err := f.client.CacheMetrics(ctx, i.FSID)
	if nydus.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// bind puts the image's entry. What is mounted and served stays as it is, with its login:
// nydusd can change those of all images only. That nydusd has the entry already says that it
// serves what is mounted. If nothing is, the old entry goes: its bootstrap may have been
// removed with another snapshot, and its login have ended.
func (f *fscache) bind(ctx context.Context, i image, b binding, mounted bool) (_ image, err error) {
	if mounted && i.bound == nil {
		i.Alive, err = f.serves(ctx, i)
	}
	i.bound = &b
	if err != nil || i.Alive && mounted {
		return i, err
	}
	i.Alive = false
	if i.Blobs, err = admit(ctx, b.bootstrap); err != nil {
		return i, err
	}
	err = f.put(ctx, i)
	if nydus.IsExists(err) && mounted {
		i.Alive = true
		return i, nil
	}
	if nydus.IsExists(err) {
		if err = f.unbind(ctx, i); err == nil {
			err = f.put(ctx, i)
		}
	}
	return i, err
}

// put writes the record first: nydusd wants its directory.
func (f *fscache) put(ctx context.Context, i image) error {
	if err := f.images.put(i); err != nil {
		return err
	}
	return f.client.PutBlob(ctx, i.bound.origin.entry(i, i.bound.bootstrap, f.images.work(i)))
}

// admit returns the blobs of a bootstrap, which the kernel may mount.
func admit(ctx context.Context, bootstrap string) ([]string, error) {
	f, err := os.Open(bootstrap)
	if err != nil {
		return nil, api.BadRequest(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	sum, err := erofs.Check(ctx, f, st.Size(), erofs.Limits{})
	if errors.As(err, new(*erofs.FormatError)) || errors.Is(err, errors.ErrUnsupported) {
		err = api.BadRequest(fmt.Errorf("bootstrap %s: %w", bootstrap, err))
	}
	return sum.Blobs, err
}

// mount mounts the image. Where a container still uses what an earlier nydusd has served, the
// kernel keeps the name for that: the image gets another one.
func (f *fscache) mount(ctx context.Context, i image, point string) (image, error) {
	err := f.helper.run(ctx, mountErofs, i.FSID, i.Domain, point)
	if errors.Is(err, syscall.EEXIST) || errors.Is(err, syscall.EBUSY) {
		if i, err = f.rename(ctx, i); err == nil {
			err = f.helper.run(ctx, mountErofs, i.FSID, i.Domain, point)
		}
	}
	if err != nil && strings.Contains(err.Error(), "fsid option not supported") {
		return i, api.BadRequest(fmt.Errorf("%w: nydusd runs with fscache, which this kernel has not (5.19 to 7.1, CONFIG_EROFS_FS_ONDEMAND): have nydusd mount by FUSE, or erofsd serve", err))
	}
	if errors.Is(err, syscall.ENOENT) {
		err = fmt.Errorf("%w: nydusd does not know the image, or answers for no cache: see its log", err)
	}
	return i, err
}

// rename binds an image by another domain. The kernel's sysfs has 36 bytes of it: what is new
// comes first.
func (f *fscache) rename(ctx context.Context, i image) (image, error) {
	if err := f.unbind(ctx, i); err != nil {
		return i, err
	}
	i.Domain = strings.ToLower(rand.Text()[:8]) + "-" + i.FSID
	return i, f.put(ctx, i)
}

func (f *fscache) unbind(ctx context.Context, i image) error {
	return f.client.DeleteBlobs(ctx, i.Domain)
}

// Times of cull.
const (
	cullTime  = 3 * time.Second // that the kernel may need to let go of what was unmounted
	cullPause = 50 * time.Millisecond
)

// cull removes what the kernel's cache has of the image, in all domains. What an image has
// that is kept goes with the last of them.
func (f *fscache) cull(ctx context.Context, i image, keep map[string]bool) error {
	end := time.Now().Add(cullTime)
	for _, name := range append([]string{i.FSID}, i.Blobs...) {
		if keep[name] {
			continue
		}
		err := f.client.CullBlob(ctx, name)
		for nydus.IsRefused(err) && time.Now().Before(end) && pause(ctx, cullPause) {
			err = f.client.CullBlob(ctx, name)
		}
		if nydus.IsRefused(err) {
			err = api.Conflict(fmt.Errorf("nydusd does not remove %s from the kernel's cache, which may still be used; it is tried again: %w", name, err))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pause returns false when ctx ends before the time is over.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// usage looks at the files in the kernel's cache. A new one has no name before it was
// unmounted for the first time: until then it counts nothing.
func (f *fscache) usage(i image) (u api.Usage, err error) {
	dir := cacheDir(f.pid)
	for n, name := range append([]string{i.FSID}, i.Blobs...) {
		var disk int64
		if dir != "" {
			disk, err = diskOf(filepath.Join(dir, "cache", "Ierofs,"+i.Domain, "@*", "D"+name))
		}
		if err != nil {
			return api.Usage{}, err
		}
		u.Disk += disk
		if n > 0 { // images share nothing, though their blobs may be called the same
			u.Blobs = append(u.Blobs, api.BlobUsage{ID: i.Domain + "/" + name, Disk: disk})
		}
	}
	return u, nil
}

// cacheDir is the directory of the kernel's cache, as nydusd's command line says it; "" where
// that cannot be read.
func cacheDir(pid int) string {
	dir := optionOf(pid, "--fscache", "-F")
	if !filepath.IsAbs(dir) {
		return ""
	}
	return filepath.Join("/proc", strconv.Itoa(pid), "root", dir)
}
