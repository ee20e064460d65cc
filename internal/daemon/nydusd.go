package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/config"
)

// Info is the daemon at this moment.
func (c *Control) Info() nydus.DaemonInfo {
	v := BuildVersion()
	info := nydus.DaemonInfo{Version: nydus.Version{
		Package: v.Version, GitCommit: v.Commit, BuildTime: v.Time, Profile: "release", Compiler: runtime.Version(),
	}}
	if n := c.o.Nydusd; n.ID != "" {
		info.ID = &n.ID
	}
	if n := c.o.Nydusd; n.Supervisor != "" {
		info.Supervisor = &n.Supervisor
	}
	c.mu.Lock()
	d := c.daemon
	info.State = c.state
	c.mu.Unlock()
	if d != nil && c.o.Transport != Cachefiles {
		info.Backends = d.backends()
	}
	return info
}

// backends lists the mounts.
func (d *Daemon) backends() map[string]nydus.Backend {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out map[string]nydus.Backend
	for point, m := range d.mounts {
		if m.img == nil {
			continue
		}
		if out == nil {
			out = map[string]nydus.Backend{}
		}
		out[point] = nydus.Backend{Type: "Rafs", Mountpoint: point, Mounted: nydus.MountTime(m.since)}
	}
	return out
}

// SetLogLevel changes the least level that is logged.
func (c *Control) SetLogLevel(level string) error {
	if c.o.Nydusd.SetLevel == nil {
		return nydus.Unsupported()
	}
	return c.o.Nydusd.SetLevel(level)
}

// Events returns the last errors.
func (c *Control) Events() nydus.Events {
	d, err := c.running()
	if err != nil {
		return nydus.Events{MaxErrors: maxEvents, MaxSize: maxEventBytes, Errors: []string{}}
	}
	return d.events.list()
}

// Exit ends the process.
func (c *Control) Exit(context.Context) error {
	c.log.Info("told to exit")
	c.hurry()
	c.quit()
	return nil
}

// SendFD gives the supervisor what a later daemon needs. From then on images stay
// mounted at the end.
func (c *Control) SendFD(ctx context.Context) error {
	socket := c.o.Nydusd.Supervisor
	if socket == "" {
		return nil
	}
	d, err := c.running()
	if err != nil {
		return err
	}
	device := d.kernel.fd()
	if device == nil {
		return nydus.NoFDs()
	}
	state, err := d.state()
	if err == nil {
		err = sendState(ctx, socket, state, device)
	}
	if err != nil {
		return nydus.UpgradeFailed("SendFd", err)
	}
	c.mu.Lock()
	c.sent = true
	c.mu.Unlock()
	return nil
}

// TakeOver gets from the supervisor what an earlier daemon gave it, for Start. If it
// fails the state stays INIT, and it can be tried again.
func (c *Control) TakeOver(ctx context.Context) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.give()
	if c.Info().State != nydus.Init {
		return nydus.UnexpectedEvent("Takeover")
	}
	if c.o.Nydusd.Supervisor == "" {
		return nydus.MissingSupervisor()
	}
	s, err := receiveState(ctx, c.o.Nydusd.Supervisor)
	if err != nil {
		return nydus.UpgradeFailed("RecvFd", err)
	}
	c.mu.Lock()
	c.taken = s
	c.mu.Unlock()
	c.changed(nydus.Init, nydus.Ready, "Takeover")
	return nil
}

// lockTime is how long Start waits for a predecessor to end.
const lockTime = 10 * time.Second

// Start serves what TakeOver got. If it fails it can be tried again.
func (c *Control) Start(ctx context.Context) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.give()
	if c.Info().State != nydus.Ready {
		return nydus.UnexpectedEvent("Start")
	}
	d, err := c.restore(ctx)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	c.mu.Lock()
	c.daemon, c.taken, c.sent = d, nil, true // the supervisor has the device
	c.mu.Unlock()
	if err := c.serveKernel(context.WithoutCancel(ctx), d); err != nil {
		c.quit()
		return fmt.Errorf("start: %w", err)
	}
	c.changed(nydus.Ready, nydus.Running, "Start")
	return nil
}

// restore makes a daemon of what was taken over. Images that cannot be had are left out:
// one missing file must not strand the others.
func (c *Control) restore(ctx context.Context) (*Daemon, error) {
	c.mu.Lock()
	taken := c.taken
	c.mu.Unlock()
	device, err := duplicate(taken.device)
	if err != nil {
		return nil, err
	}
	o := c.o
	o.Transport, o.Fscache, o.Device = Cachefiles, taken.state.Fscache, device
	o.Kernel.Inherited = true
	d, err := newWhenFree(ctx, o)
	if err != nil {
		return nil, errors.Join(err, device.Close())
	}
	for _, s := range taken.state.Images {
		e, _, err := config.ParseBlobEntry(s.Entry)
		switch {
		case err != nil:
		case s.Bound:
			err = c.bindEntry(ctx, d, e)
		default:
			d.remembered[entryKey(e.DomainID, e.ID)] = e.Image
		}
		if err != nil {
			c.log.Error("an image of an earlier daemon cannot be restored; what it lacks reads as EIO", "image", e.ID, "err", err)
		}
	}
	if err := taken.device.Close(); err != nil {
		c.log.Warn("close device", "err", err)
	}
	return d, nil
}

// newWhenFree is New that waits for the predecessor's end.
func newWhenFree(ctx context.Context, o Options) (*Daemon, error) {
	ctx, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	for {
		d, err := New(o)
		if !errors.Is(err, errLocked) {
			return d, err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// entryKey is the key of an image that nydus's API calls so. Without a domain the kernel
// takes the fsid for it.
func entryKey(domain, id string) imageKey { return imageKey{ownDomain(cmp.Or(domain, id)), id} }

// PutBlob binds the image that entry describes.
func (c *Control) PutBlob(ctx context.Context, entry []byte) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	e, warnings, err := config.ParseBlobEntry(entry)
	var parse *config.ParseError
	var request *config.RequestError
	switch {
	case errors.As(err, &parse):
		return nydus.ParseBody(parse.Message, parse.Line, parse.Column)
	case errors.As(err, &request):
		return nydus.BadRequest(err)
	case err != nil:
		return nydus.Invalid(err)
	}
	for _, w := range warnings {
		c.log.Debug("configuration of an image", "image", e.ID, "warning", w)
	}
	err = c.bindEntry(ctx, d, e)
	if e := (*api.Error)(nil); errors.As(err, &e) {
		if e.Status == http.StatusConflict {
			return nydus.Exists(err)
		}
		return nydus.Invalid(err)
	}
	return err
}

// bindEntry binds the image of e, with what SetConfig said of it.
func (c *Control) bindEntry(ctx context.Context, d *Daemon, e config.BlobEntry) error {
	k := entryKey(e.DomainID, e.ID)
	c.mu.Lock()
	for id, values := range c.values {
		if r := e.Image.Backend.Registry; calls(id, k, e.Image.ID) && r != nil && r.Auth == "" && r.Token == "" {
			e.Image = withValues(e.Image, values)
		}
	}
	c.mu.Unlock()
	return d.Bind(ctx, boundImage{key: k, bootstrap: d.copyOf(k, e.Bootstrap), config: e.Image})
}

// copyOf returns the daemon's own copy of k's bootstrap if name is gone.
func (d *Daemon) copyOf(k imageKey, name string) string {
	if own := d.file(k, bootSuffix); !exists(name) && exists(own) {
		return own
	}
	return name
}

// Blobs lists the images that are bound in a domain, and their data blobs.
func (c *Control) Blobs(_ context.Context, domainID, blobID string) ([]nydus.BlobInfo, error) {
	d, err := c.running()
	if err != nil {
		return nil, err
	}
	out := []nydus.BlobInfo{}
	data := map[string]*nydus.BlobInfo{}
	for _, b := range d.Bindings(entryKey(domainID, blobID).domain) {
		info := nydus.BlobInfo{
			Type: nydus.BootstrapBlob, ID: b.key.id, DomainID: domainID, Size: b.boot.Size(),
			Allocated: d.kernel.usage(b.key, ""), Open: d.kernel.live(b.key, b.key.id), Blobs: []string{},
		}
		d.mu.Lock()
		info.ConfigID, info.Backend = b.config.ID, b.config.Backend.Type
		d.mu.Unlock()
		for _, e := range b.blobs {
			info.Blobs = append(info.Blobs, e.ID)
			if data[e.ID] == nil {
				data[e.ID] = &nydus.BlobInfo{
					Type: nydus.DataBlob, ID: e.ID, DomainID: domainID, Size: e.Size,
					Allocated: d.kernel.usage(b.key, e.ID), Open: d.kernel.live(b.key, e.ID),
				}
			}
			data[e.ID].Images++
		}
		out = append(out, info)
	}
	for _, id := range slices.Sorted(maps.Keys(data)) {
		out = append(out, *data[id])
	}
	return slices.DeleteFunc(out, func(b nydus.BlobInfo) bool { return blobID != "" && b.ID != blobID }), nil
}

// DeleteBlob unbinds an image, or all of a domain. A data blob belongs to its images:
// there is nothing to do for it.
func (c *Control) DeleteBlob(ctx context.Context, domainID, blobID string) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	if blobID == "" {
		if domainID == "" {
			return nil
		}
		return d.Unbind(imageKey{domain: ownDomain(domainID)})
	}
	if d.Unbind(entryKey(domainID, blobID)) == nil {
		return nil
	}
	known, err := c.Blobs(ctx, domainID, blobID)
	if err == nil && len(known) == 0 {
		err = nydus.NoEntry(blobID)
	}
	return err
}

// CullBlob removes what the cache has of a blob, at once or when the kernel lets it go.
func (c *Control) CullBlob(ctx context.Context, blobID string) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	if err := d.Cull(ctx, blobID); err != nil {
		return nydus.CullFailed(err)
	}
	return nil
}

// Limits of what [Control.Events] remembers.
const (
	maxEvents     = 500
	maxEventBytes = 51200
)

// events are the last errors that readers met.
type events struct {
	mu    sync.Mutex // guards what follows
	total int64
	size  int
	texts []string
}

// add remembers text.
func (e *events) add(text string) {
	text = time.Now().UTC().Format(http.TimeFormat) + " - " + text[:min(len(text), 4096)]
	e.mu.Lock()
	defer e.mu.Unlock()
	e.total++
	e.size += len(text)
	e.texts = append(e.texts, text)
	for len(e.texts) > maxEvents || e.size > maxEventBytes {
		e.size -= len(e.texts[0])
		e.texts = e.texts[1:]
	}
}

func (e *events) list() nydus.Events {
	e.mu.Lock()
	defer e.mu.Unlock()
	return nydus.Events{
		MaxErrors: maxEvents, TotalErrors: e.total, MaxSize: maxEventBytes, TotalSize: e.size,
		Errors: append([]string{}, e.texts...),
	}
}

// calls reports whether id, in one of the forms that clients use, means the image k whose
// configuration is called name: a snapshotter's with a slash before, or "/" for all.
func calls(id string, k imageKey, name string) bool {
	if id == "/" {
		return true
	}
	id = strings.TrimPrefix(id, "/")
	return id != "" && (id == k.id || id == name || id == k.kernelDomain()+"/"+k.id || id == k.domain && k.domain != "")
}

// Config returns what SetConfig was told.
func (c *Control) Config(id string) (map[string]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]string{}
	for of, values := range c.values {
		for key, v := range values {
			switch {
			case id == "":
				out[of+":"+key] = v
			case id == of:
				out[key] = v
			}
		}
	}
	return out, nil
}

// maxConfigs bounds the ids that SetConfig remembers.
const maxConfigs = 4096

// SetConfig changes credentials or proxy of the images that id means, and of those that
// are bound later without any.
func (c *Control) SetConfig(ctx context.Context, id string, values map[string]string) error {
	d, err := c.running()
	if err != nil {
		return err
	}
	c.mu.Lock()
	if c.values[id] == nil && len(c.values) >= maxConfigs {
		c.mu.Unlock()
		return nydus.Invalid(fmt.Errorf("configurations of %d ids are remembered already", maxConfigs))
	}
	all := maps.Clone(c.values[id])
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, values)
	c.values[id] = all
	c.mu.Unlock()
	return d.reconfigure(ctx, id, values)
}
