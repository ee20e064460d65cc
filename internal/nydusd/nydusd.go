package nydusd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
)

// Options say where a [Daemon] is.
type Options struct {
	Socket string // nydusd's API
	// Dir is for the images' records, and for files of nydusd, which has to see it by the
	// same name. It is made when it is needed.
	Dir   string
	Login Login // nil: docker's configuration is not asked
}

// A Daemon is a nydusd that somebody else runs. Its methods are safe for concurrent use, but
// those that change an image must be called one after the other, as the snapshotter does. A
// refusal is an *api.Error; any other error means that nydusd could not be asked.
type Daemon struct {
	o Options
	parts

	mu    sync.Mutex // guards what follows
	way   way        // of the nydusd that was found last; nil: none was
	about api.VersionInfo
}

// parts are what the ways have in common.
type parts struct {
	client *nydus.Client
	images *images
	helper helper
}

// A way is one of the two in which a nydusd serves images.
type way interface {
	name() string
	// mounted returns those of all mounts that are of the image.
	mounted(i image, all []mountinfo.Info) []mountinfo.Info
	// serves asks whether this nydusd serves what is mounted of the image, though it was not
	// bound since we were started.
	serves(ctx context.Context, i image) (bool, error)
	// bind makes an image known, and finds out whether it is alive.
	bind(ctx context.Context, i image, b binding, mounted bool) (image, error)
	// mount mounts a bound image that is not alive. The image that it returns counts, also
	// with an error.
	mount(ctx context.Context, i image, point string) (image, error)
	unbind(ctx context.Context, i image) error
	// cull removes what of the image is not in its directory, but nothing that is in keep.
	cull(ctx context.Context, i image, keep map[string]bool) error
	usage(i image) (api.Usage, error)
}

// A binding is what nydusd is told of an image.
type binding struct {
	bootstrap string // a path
	origin    origin
}

// New returns one; nothing is asked before [Daemon.Begin].
func New(o Options) (*Daemon, error) {
	s, err := openImages(o.Dir)
	if err != nil {
		return nil, err
	}
	return &Daemon{o: o, parts: parts{client: nydus.NewClient(o.Socket), images: s}}, nil
}

// Close drops connections.
func (d *Daemon) Close() { d.client.Close() }

// Begin is to be called when a nydusd was found, which is the process pid, or 0 if that is
// not known. What an earlier one served has to be bound and mounted anew then.
func (d *Daemon) Begin(ctx context.Context, pid int) error {
	info, err := d.client.Info(ctx)
	if err != nil {
		return err
	}
	if info.State != nydus.Running {
		return fmt.Errorf("nydusd at %s is in state %s and serves nothing: whoever started it has to let it begin", d.o.Socket, info.State)
	}
	var w way = &fscache{&d.parts, pid}
	if info.Backends != nil { // one without FUSE has no such list, not even an empty one
		if w, err = newFuse(&d.parts, pid); err != nil {
			return err
		}
	}
	d.images.begin()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.way = w
	d.about = api.VersionInfo{Version: "nydusd " + cmp.Or(info.Version.Package, "of unknown version"), Commit: info.Version.GitCommit, Transport: w.name(), PID: pid}
	return nil
}

// found returns how images are served, and by whom.
func (d *Daemon) found() (way, api.VersionInfo, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.way == nil {
		return nil, api.VersionInfo{}, fmt.Errorf("no nydusd has answered at %s", d.o.Socket)
	}
	return d.way, d.about, nil
}

// Version returns what runs, if it answers.
func (d *Daemon) Version(ctx context.Context) (api.VersionInfo, error) {
	_, v, err := d.found()
	if err == nil {
		_, err = d.client.Info(ctx)
	}
	return v, err
}

// BindImage makes an image known, or brings a login.
func (d *Daemon) BindImage(ctx context.Context, r api.BindRequest) error {
	w, _, err := d.found()
	if err != nil {
		return err
	}
	o, err := parseOrigin(r.Config)
	if err == nil {
		err = o.settle(ctx, d.o.Login)
	}
	if err != nil {
		return err
	}
	i := d.images.obtain(imageKey{r.DomainID, r.ID})
	mounts, err := allMounts()
	if err != nil {
		return err
	}
	i, err = w.bind(ctx, i, binding{r.Bootstrap, o}, len(w.mounted(i, mounts)) > 0)
	if err != nil {
		return refused(err, o.secrets()...)
	}
	d.images.set(i)
	return nil
}

// Mount mounts a bound image: where it is mounted already, the same once more.
func (d *Daemon) Mount(ctx context.Context, r api.MountRequest) (api.Mount, error) {
	w, i, err := d.known(r.DomainID, r.Image)
	if err != nil {
		return api.Mount{}, err
	}
	mounts, err := allMounts()
	if err != nil {
		return api.Mount{}, err
	}
	there := w.mounted(i, mounts)
	if len(there) > 0 && i.bound == nil {
		i.Alive, err = w.serves(ctx, i)
	}
	switch {
	case err != nil:
	case len(there) > 0 && i.Alive:
		err = d.helper.run(ctx, bindMount, there[0].Mountpoint, r.Mountpoint)
	case i.bound == nil:
		err = api.NotFound(fmt.Errorf("image %s is not bound", i.ID))
	default:
		i, err = w.mount(ctx, i, r.Mountpoint)
		i.Alive = err == nil
	}
	if err != nil {
		return api.Mount{}, refused(err, i.secrets()...)
	}
	d.images.set(i)
	return i.mount(r.Mountpoint, w), nil
}

// Unmount unmounts what is at a place. What is used there is api.Conflict.
func (d *Daemon) Unmount(ctx context.Context, r api.UnmountRequest) error {
	st, err := d.mounts()
	if err != nil {
		return err
	}
	for _, m := range st {
		if m.Mountpoint != r.Mountpoint {
			continue
		}
		err := d.helper.run(ctx, unmount, r.Mountpoint)
		if errors.Is(err, syscall.EBUSY) {
			err = api.Conflict(err)
		}
		return err
	}
	return api.NotFound(fmt.Errorf("nothing of nydusd's is mounted at %s", r.Mountpoint))
}

// UnbindImage has nydusd forget an image.
func (d *Daemon) UnbindImage(ctx context.Context, r api.ImageRequest) error {
	w, i, err := d.known(r.DomainID, r.Image)
	if err != nil {
		return err
	}
	if err := w.unbind(ctx, i); err != nil && !nydus.IsNoEntry(err) {
		return refused(err)
	}
	i.Alive, i.bound = false, nil // with its login
	d.images.set(i)
	return nil
}

// Remove removes what there is of an image that is unbound. What is still used is
// api.Conflict.
func (d *Daemon) Remove(ctx context.Context, r api.RemoveRequest) error {
	w, i, err := d.known(r.DomainID, r.Image)
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, other := range d.images.all() {
		for _, b := range other.Blobs {
			keep[b] = keep[b] || other.FSID != i.FSID
		}
	}
	if err := w.cull(ctx, i, keep); err != nil {
		return refused(err)
	}
	return d.images.remove(i)
}

// Prefetch is refused: nydusd fetches what its configuration says when it mounts an image,
// and cannot be asked for more.
func (d *Daemon) Prefetch(context.Context, api.PrefetchRequest) error {
	return unsupported("nydusd cannot be asked to fetch files of an image that is mounted; say in backend.template what it fetches by itself")
}

// Usage returns what an image takes of the disk as far as that can be seen. Present and Total
// are 0: nydusd does not say them.
func (d *Daemon) Usage(_ context.Context, r api.ImageRequest) (api.Usage, error) {
	w, i, err := d.known(r.DomainID, r.Image)
	if err != nil {
		return api.Usage{}, err
	}
	return w.usage(i)
}

// Status returns the mounted images that nydusd serves. What is fetched of them, and whether
// a registry refuses, nydusd does not say.
func (d *Daemon) Status(ctx context.Context) (api.Status, error) {
	w, v, err := d.found()
	if err != nil {
		return api.Status{}, err
	}
	mounts, err := d.mounts()
	if err != nil {
		return api.Status{}, err
	}
	st := api.Status{Version: v.Version, PID: v.PID, Root: d.o.Dir, Transport: v.Transport}
	for _, m := range mounts {
		if m.image.bound == nil { // an earlier snapshotter may have done that
			if m.image.Alive, err = w.serves(ctx, m.image); err != nil {
				return api.Status{}, refused(err)
			}
		}
		if m.image.Alive {
			st.Images = append(st.Images, m.image.mount(m.Mountpoint, w))
		}
	}
	return st, nil
}

// Cache is refused: what nydusd's cache takes is known to whoever runs it.
func (d *Daemon) Cache(context.Context) (api.Cache, error) {
	return api.Cache{}, unsupported("nydusd does not say what its cache takes")
}

// Upgrade is refused.
func (d *Daemon) Upgrade(context.Context, api.UpgradeRequest) error {
	return unsupported("nydusd was started by somebody else, who has to replace it")
}

func unsupported(why string) error {
	return &api.Error{Status: http.StatusNotImplemented, Message: why}
}

// known returns an image that was bound, now or by an earlier process.
func (d *Daemon) known(domainID, id string) (way, image, error) {
	w, _, err := d.found()
	if err != nil {
		return nil, image{}, err
	}
	i, err := d.images.get(imageKey{domainID, id})
	return w, i, err
}

// A mountOf is a mount of an image.
type mountOf struct {
	mountinfo.Info
	image image
}

// mounts returns all mounts of images.
func (d *Daemon) mounts() (list []mountOf, err error) {
	w, _, err := d.found()
	if err != nil {
		return nil, err
	}
	all, err := allMounts()
	for _, i := range d.images.all() {
		for _, m := range w.mounted(i, all) {
			list = append(list, mountOf{m, i})
		}
	}
	return list, err
}

// allMounts returns the mounts that nydusd may have to do with.
func allMounts() (list []mountinfo.Info, err error) {
	all, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.FSType != "erofs" && i.FSType != "fuse" && !strings.HasPrefix(i.FSType, "fuse."), false
	})
	if err != nil {
		return nil, fmt.Errorf("read the table of mounts: %w", err)
	}
	for _, i := range all {
		list = append(list, *i)
	}
	return list, nil
}

// refused makes of a refusal of nydusd's one of the daemon's, which has nothing of secrets.
func refused(err error, secrets ...string) error {
	var e *nydus.Error
	if !errors.As(err, &e) {
		return err
	}
	text := e.Error()
	for _, s := range secrets {
		text = strings.ReplaceAll(text, s, "[secret]")
	}
	return &api.Error{Status: e.Status, Message: "nydusd refuses: " + text}
}

// diskOf is what files that match a pattern take of the disk, in bytes.
func diskOf(pattern string) (n int64, err error) {
	names, err := filepath.Glob(pattern)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		st, err := os.Lstat(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		if s, ok := st.Sys().(*syscall.Stat_t); ok {
			n += s.Blocks * 512
		}
	}
	return n, nil
}

// optionOf is the value of an option on the command line of a process, by its long or its
// short name; "" where there is none, or that cannot be read.
func optionOf(pid int, long, short string) string {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return ""
	}
	args := strings.Split(string(text), "\x00")
	for n, a := range args {
		if v, ok := strings.CutPrefix(a, long+"="); ok {
			return v
		}
		if (a == long || a == short) && n+1 < len(args) {
			return args[n+1]
		}
	}
	return ""
}
