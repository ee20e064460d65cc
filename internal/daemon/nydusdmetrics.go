package daemon

import (
	"path/filepath"
	"slices"

	"github.com/erofsd/erofsd/internal/api/nydus"
)

// The kernel counts what programs do with files; there is no counter here.

// FsStats has nothing to tell.
func (c *Control) FsStats(string) (nydus.FsStats, error) { return nydus.FsStats{}, nydus.NoCounter() }

// FsFiles has nothing to tell.
func (c *Control) FsFiles(string, bool) (nydus.FsFiles, error) {
	return nydus.FsFiles{}, nydus.NoCounter()
}

// FsPattern has nothing to tell.
func (c *Control) FsPattern(string) ([]nydus.FilePattern, error) { return nil, nydus.NoCounter() }

// Inflight is FUSE's.
func (c *Control) Inflight() ([]nydus.Inflight, error) { return nil, nydus.Unsupported() }

// described is what the metrics of some images need.
type described struct {
	images []*image        // open
	blobs  map[string]bool // of images that are bound or open
	meters map[*meter]struct{}
	kind   string // of backend
}

// find returns the images that id means, all without one; nil when there are none.
func (d *Daemon) find(id string) *described {
	f := &described{blobs: map[string]bool{}, meters: map[*meter]struct{}{}}
	found := false
	take := func(k imageKey, src *source) bool {
		name := ""
		if src != nil && src.config != nil {
			name = src.config.ID
		}
		if id != "" && !calls(id, k, name) {
			return false
		}
		found = true
		if src != nil && src.meter != nil {
			f.meters[src.meter] = struct{}{}
			f.kind = src.kind
		}
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for k, b := range d.bindings {
		if take(k, b.src) {
			for _, e := range b.blobs {
				f.blobs[e.ID] = true
			}
		}
	}
	for k, img := range d.images {
		if !img.isOpen() || !take(k, img.src) {
			continue
		}
		f.images = append(f.images, img)
		for _, v := range img.devices {
			f.blobs[v.id] = true
		}
	}
	if !found {
		return nil
	}
	return f
}

// BackendMetrics adds up the reads of the images that id means.
func (c *Control) BackendMetrics(id string) (nydus.BackendMetrics, error) {
	d, err := c.running()
	if err != nil {
		return nydus.BackendMetrics{}, err
	}
	f := d.find(id)
	if f == nil {
		return nydus.BackendMetrics{}, nydus.NoCounter()
	}
	out := nydus.BackendMetrics{Type: f.kind}
	for m := range f.meters {
		m.addTo(&out)
	}
	return out, nil
}

// CacheMetrics adds up the caches of the images that id means.
func (c *Control) CacheMetrics(id string) (nydus.CacheMetrics, error) {
	d, err := c.running()
	if err != nil {
		return nydus.CacheMetrics{}, err
	}
	f := d.find(id)
	if f == nil {
		return nydus.CacheMetrics{}, nydus.NoCounter()
	}
	out := nydus.CacheMetrics{Files: []string{}, Dir: filepath.Join(d.o.Root, "cache"), Complete: len(f.images) > 0}
	if d.kernel.name() == Cachefiles {
		out.Dir = d.o.cacheDir()
	}
	for id := range f.blobs {
		out.Files = append(out.Files, id+".blob.data")
	}
	slices.Sort(out.Files)
	seen := map[*device]bool{}
	for _, img := range f.images {
		for _, v := range img.devices {
			if !seen[v] {
				seen[v] = true
				v.addTo(&out)
			}
		}
	}
	return out, nil
}

// addTo adds v to m.
func (v *device) addTo(m *nydus.CacheMetrics) {
	s := v.blob.Stats()
	events, ready := uint64(v.events.Load()), uint64(v.ready.Load())
	m.Total += events
	m.WholeHits += ready
	m.PartialHits += events - min(ready, events)
	m.Entries += uint64(s.Chunks)
	m.PrefetchBytes += uint64(s.Unasked)
	m.PrefetchRequests += uint64(s.UnaskedRequests)
	m.PrefetchWorkers += uint64(s.Workers)
	m.Complete = m.Complete && s.Complete
	if s.UnaskedSince.IsZero() {
		return
	}
	begin, end := uint64(s.UnaskedSince.UnixMilli()), uint64(s.UnaskedUntil.UnixMilli())
	if old := m.PrefetchBeginSecond*1000 + m.PrefetchBeginMillis; old == 0 || begin < old {
		m.PrefetchBeginSecond, m.PrefetchBeginMillis = begin/1000, begin%1000
	}
	if end > m.PrefetchEndSecond*1000+m.PrefetchEndMillis {
		m.PrefetchEndSecond, m.PrefetchEndMillis = end/1000, end%1000
	}
	m.PrefetchMillis += end - min(begin, end)
}
