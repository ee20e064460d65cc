package daemon

import (
	"cmp"
	"context"
	"os"
	"runtime/debug"
	"slices"

	"github.com/erofsd/erofsd/internal/api"
)

// Status describes every mounted image, and those that are unmounted here but
// still used.
func (d *Daemon) Status(context.Context) (api.Status, error) {
	d.reap()
	st := api.Status{
		Version: Version(), PID: os.Getpid(), Root: d.o.Root, Transport: d.kernel.name(), Images: []api.Mount{},
		Kernel: d.kernel.stats(), Sandbox: d.o.confinement.shown(),
	}
	all, err := d.listKept()
	if err != nil {
		return st, err
	}
	st.Kept, st.CacheBytes, st.CacheHigh = []api.Kept{}, d.usage(all), d.o.High
	st.CacheEvicted, _ = d.blobs.Evicted()
	for _, k := range all {
		st.Kept = append(st.Kept, api.Kept{
			ID: k.key.id, DomainID: k.key.domain, Source: k.Label, Used: k.used, InUse: k.open, Pinned: k.Pinned,
		})
	}
	var shown []*mount
	d.mu.Lock()
	for _, m := range d.mounts {
		if m.img != nil {
			shown = append(shown, m)
		}
	}
	for _, img := range d.images {
		if img.refs == 0 {
			shown = append(shown, &mount{img: img})
		}
	}
	d.mu.Unlock()
	for _, m := range shown {
		st.Images = append(st.Images, d.describe(m))
	}
	slices.SortFunc(st.Images, func(a, b api.Mount) int {
		return cmp.Or(cmp.Compare(a.Mountpoint, b.Mountpoint), cmp.Compare(a.ID, b.ID))
	})
	return st, nil
}

// describe shows one mount. m.img is set and open.
func (d *Daemon) describe(m *mount) api.Mount {
	a := api.Mount{
		Mountpoint: m.point, ID: m.img.key.id, DomainID: m.img.key.domain, Source: m.source, Transport: d.kernel.name(),
		Complete: true, Detached: m.point == "", Blobs: []api.Blob{},
	}
	for _, v := range m.img.devices {
		s := v.blob.Stats()
		b := api.Blob{
			ID: v.id, Complete: s.Complete,
			BytesTotal: s.Needed, BytesPresent: s.Present, BytesFetched: s.Fetched, Requests: s.Requests,
		}
		if e := v.last.Load(); e != nil {
			b.LastError, b.Denied = e.text, e.denied
		}
		a.Blobs = append(a.Blobs, b)
		a.Complete = a.Complete && b.Complete
		a.BytesTotal += b.BytesTotal
		a.BytesPresent += b.BytesPresent
		a.BytesFetched += b.BytesFetched
		a.BackendRequests += b.Requests
		a.CorruptChunks += s.Corrupt
		a.KernelEvents += v.events.Load()
	}
	return a
}

// A Build says what the binary was built from.
type Build struct {
	Version, Commit, Time string
}

// BuildVersion is what the binary was built from, as far as it is known.
func BuildVersion() Build {
	b := Build{Version: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	b.Version = info.Main.Version
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.time":
			b.Time = s.Value
		}
	}
	return b
}

// Version is the version that the binary was built from.
func Version() string { return BuildVersion().Version }
