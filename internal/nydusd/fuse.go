package nydusd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
)

// fuse is the way of a nydusd that mounts images in a FUSE of its own: each in a directory
// there, which is bound to where it is wanted.
type fuse struct {
	*parts
	root string // of its file system
}

func newFuse(p *parts, pid int) (*fuse, error) {
	root, err := fuseRoot(pid)
	if err != nil {
		return nil, err
	}
	return &fuse{p, root}, nil
}

func (*fuse) name() string { return "nydusd fuse" }

// fuseRoot is where nydusd's own file system is mounted: as its command line says, or the only
// one that there is.
func fuseRoot(pid int) (string, error) {
	all, err := allMounts()
	if err != nil {
		return "", err
	}
	given := optionOf(pid, "--mountpoint", "-M")
	if dir, err := filepath.EvalSymlinks(filepath.Dir(given)); err == nil && given != "" { // as the table of mounts has it
		given = filepath.Join(dir, filepath.Base(given))
	}
	var found []string
	for _, m := range all {
		switch {
		case m.FSType == "erofs" || m.Root != "/":
		case m.Mountpoint == given:
			return given, nil
		case m.Source == "rafs":
			found = append(found, m.Mountpoint)
		}
	}
	if given != "" || len(found) != 1 {
		return "", fmt.Errorf("nydusd serves by FUSE, and where is not known: its --mountpoint is %q and not among the mounts that are seen from here, and of type rafs there are %q; start the snapshotter in nydusd's mount namespace, with one nydusd", given, found)
	}
	return found[0], nil
}

// place is nydusd's mount point of an image.
func (f *fuse) place(i image) string { return "/" + i.FSID }

func (f *fuse) mounted(i image, all []mountinfo.Info) (list []mountinfo.Info) {
	var major, minor int // of the last one at root: that of a nydusd that died may be below it
	for _, m := range all {
		if m.Mountpoint == f.root && m.Root == "/" {
			major, minor = m.Major, m.Minor
		}
	}
	for _, m := range all {
		if m.FSType != "erofs" && m.Major == major && m.Minor == minor && m.Root == f.place(i) {
			list = append(list, m)
		}
	}
	return list
}

// serves asks whether nydusd has the image mounted.
func (f *fuse) serves(ctx context.Context, i image) (bool, error) {
	info, err := f.client.Info(ctx)
	_, ok := info.Backends[f.place(i)]
	return ok, err
}

// bind remembers what to mount, and brings the login of what is mounted: a nydusd that cannot
// take it keeps the one that it has.
func (f *fuse) bind(ctx context.Context, i image, b binding, mounted bool) (image, error) {
	there, err := f.serves(ctx, i)
	if err != nil {
		return i, err
	}
	if auth := b.origin.auth(); there && auth != "" {
		err = f.client.SetConfig(ctx, f.place(i), map[string]string{"registry_auth": auth})
		if err != nil && !nydus.IsRefused(err) {
			return i, err
		}
	}
	i.Alive, i.bound = there && mounted, &b
	return i, f.images.put(i)
}

func (f *fuse) mount(ctx context.Context, i image, point string) (image, error) {
	config, err := i.bound.origin.mount(i, f.images.work(i))
	if err != nil {
		return i, err
	}
	err = f.client.Mount(ctx, f.place(i), nydus.MountCommand{Source: i.bound.bootstrap, Type: nydus.Rafs, Config: config})
	if err != nil && !nydus.IsExists(err) {
		return i, err
	}
	return i, f.helper.run(ctx, bindMount, filepath.Join(f.root, i.FSID), point)
}

func (f *fuse) unbind(ctx context.Context, i image) error {
	return f.client.Unmount(ctx, f.place(i))
}

// cull has nothing to do: all is in the image's directory.
func (*fuse) cull(context.Context, image, map[string]bool) error { return nil }

// usage looks at nydusd's cache files.
func (f *fuse) usage(i image) (u api.Usage, err error) {
	work := f.images.work(i)
	names, err := os.ReadDir(work)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return u, err
	}
	for _, n := range names {
		disk, err := diskOf(filepath.Join(work, n.Name()))
		if err != nil {
			return u, err
		}
		u.Disk += disk
		if blob, ok := strings.CutSuffix(n.Name(), ".blob.data"); ok {
			u.Blobs = append(u.Blobs, api.BlobUsage{ID: i.FSID + "/" + blob, Disk: disk})
		}
	}
	return u, nil
}
