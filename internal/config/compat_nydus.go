package config

import "bytes"

// nydusV1 is nydus's first form, RafsConfig. What no code below asks for has no effect
// and is only checked.
type nydusV1 struct {
	Device          nydusV1Device `key:"device,required"`
	Mode            string        `key:"mode,required"`
	DigestValidate  bool          `key:"digest_validate"` // digests are always checked
	IOStatsFiles    bool          `key:"iostats_files"`
	AccessPattern   bool          `key:"access_pattern"`
	LatestReadFiles bool          `key:"latest_read_files"`
	EnableXattr     bool          `key:"enable_xattr"`
	AmplifyIO       *Size         `key:"amplify_io"`
	Prefetch        *prefetchV1   `key:"fs_prefetch"`
}

type nydusV1Device struct {
	ID       string         `key:"id"`
	Backend  nydusV1Backend `key:"backend,required"`
	External []*node        `key:"external_backends"`
	Cache    nydusV1Cache   `key:"cache"`
}

type nydusV1Backend struct {
	Type   string `key:"type,required"`
	Config *node  `key:"config,required"`
}

type nydusV1Cache struct {
	Type       string      `key:"type"`
	Compressed bool        `key:"compressed"`
	Config     cacheConfig `key:"config"`
	Validate   bool        `key:"validate"`
	Prefetch   *prefetchV1 `key:"prefetch_config"`
}

// nydusV2 is nydus's second form.
type nydusV2 struct {
	Version  *int       `key:"version,required"`
	ID       string     `key:"id"`
	Backend  *Backend   `key:"backend,required"`
	External []*node    `key:"external_backends"`
	Cache    cacheV2    `key:"cache"`
	Rafs     rafsV2     `key:"rafs"`
	Overlay  *overlayV2 `key:"overlay"`
}

type cacheV2 struct {
	Type       string       `key:"type"`
	Compressed bool         `key:"compressed"`
	Validate   bool         `key:"validate"`
	Prefetch   *prefetchV2  `key:"prefetch"`
	FileCache  *cacheConfig `key:"filecache"`
	BlobCache  *cacheConfig `key:"blobcache"`
	Fscache    *cacheConfig `key:"fscache"`
}

type rafsV2 struct {
	Mode            *string     `key:"mode"`
	BatchSize       *Size       `key:"batch_size"`
	Validate        bool        `key:"validate"`
	EnableXattr     bool        `key:"enable_xattr"`
	IOStatsFiles    bool        `key:"iostats_files"`
	AccessPattern   bool        `key:"access_pattern"`
	LatestReadFiles bool        `key:"latest_read_files"`
	Prefetch        *prefetchV2 `key:"prefetch"`
}

type overlayV2 struct {
	UpperDir string `key:"upper_dir"`
	WorkDir  string `key:"work_dir"`
}

// cacheConfig is a cache's own table in every form.
type cacheConfig struct {
	WorkDir           *string `key:"work_dir"`
	DisableIndexedMap bool    `key:"disable_indexed_map"`
	Encrypt           bool    `key:"enable_encryption"`
	EncryptConvergent bool    `key:"enable_convergent_encryption"`
	EncryptionKey     Secret  `key:"encryption_key"`
}

type prefetchV2 struct {
	Enable         *bool `key:"enable"`
	Threads        *int  `key:"threads"`
	BatchSize      Size  `key:"batch_size"`
	BandwidthLimit Size  `key:"bandwidth_limit"`
	All            *bool `key:"prefetch_all"`
	Stream         bool  `key:"stream_prefetch"`
}

// prefetchV1 is prefetchV2 by other names.
type prefetchV1 struct {
	Enable         *bool `key:"enable"`
	Threads        *int  `key:"threads_count"`
	BatchSize      Size  `key:"merging_size"`
	BandwidthLimit Size  `key:"bandwidth_rate"`
	All            *bool `key:"prefetch_all"`
	Stream         bool  `key:"stream_prefetch"`
}

// ParseNydus reads a configuration file of nydus: v1 JSON, v2 JSON or v2 TOML, which it
// tells apart by what is in them. Unknown keys, and keys whose effect we do not have,
// are no errors but texts of the second result. The error joins a [Problem] for each
// thing that is wrong.
func ParseNydus(data []byte) (Image, []string, error) {
	d := &decoder{}
	root, err := d.document(data)
	if err != nil {
		return Image{}, nil, err
	}
	var i Image
	switch {
	case root.kind != kindObject:
		d.want(root, nil, kindObject, "a map")
	case root.field("version") == nil && root.field("device") != nil:
		i = d.nydusV1(root)
	default:
		i = d.nydusV2(root)
	}
	if err := d.err(root, ""); err != nil {
		return Image{}, d.warned(root), err
	}
	return i, d.warned(root), nil
}

// document parses JSON, which begins with a brace, or TOML.
func (d *decoder) document(data []byte) (*node, error) {
	if text := bytes.TrimSpace(data); len(text) > 0 && text[0] != '{' {
		return parseTOML(data)
	}
	return parseJSON(data, &d.findings)
}

func (d *decoder) nydusV1(root *node) Image {
	var c nydusV1
	d.object(root, nil, addressed(&c))
	device := path{"device"}
	i := Image{ID: c.Device.ID, Amplify: c.AmplifyIO}
	d.flatBackend(&i, c.Device.Backend.Type, device.at("backend", "type"), c.Device.Backend.Config, device.at("backend", "config"))
	d.external(device.at("external_backends"), c.Device.External)
	if c.Mode != "" {
		oneOf(&d.findings, path{"mode"}, c.Mode, "direct", "cached")
	}
	d.amplify(path{"amplify_io"}, c.AmplifyIO)
	cache := device.at("cache")
	d.cacheType(cache, "type", c.Device.Cache.Type, c.Device.Cache.Compressed)
	i.WorkDir = d.workDir(cache.at("config"), &c.Device.Cache.Config)
	d.prefetchV1(cache.at("prefetch_config"), c.Device.Cache.Prefetch)
	d.prefetchV1(path{"fs_prefetch"}, c.Prefetch)
	i.Prefetch = prefetch(true, (*prefetchV2)(c.Device.Cache.Prefetch), (*prefetchV2)(c.Prefetch))
	return i
}

func (d *decoder) nydusV2(root *node) Image {
	var c nydusV2
	d.object(root, nil, addressed(&c))
	if c.Version != nil && *c.Version != 2 {
		d.add(path{"version"}, "want 2")
	}
	if c.Overlay != nil {
		d.warn(path{"overlay"}, "has no effect: images are mounted read-only")
	}
	i := Image{ID: c.ID, Amplify: c.Rafs.BatchSize}
	d.tableBackend(&i, c.Backend, path{"backend"})
	d.external(path{"external_backends"}, c.External)
	i.WorkDir = d.cacheV2(path{"cache"}, &c.Cache)
	d.rafsV2(path{"rafs"}, &c.Rafs)
	i.Prefetch = prefetch(false, c.Cache.Prefetch, c.Rafs.Prefetch)
	return i
}

// cacheV2 checks the table and returns the directory that it names.
func (d *decoder) cacheV2(p path, c *cacheV2) string {
	d.cacheType(p, "type", c.Type, c.Compressed)
	d.prefetchV2(p.at("prefetch"), c.Prefetch)
	file := d.workDir(p.at("filecache"), c.FileCache)
	blob := d.workDir(p.at("blobcache"), c.BlobCache)
	fscache := d.workDir(p.at("fscache"), c.Fscache)
	switch {
	case c.Type == "fscache":
		return fscache
	case c.BlobCache != nil && c.FileCache == nil:
		return blob
	}
	return file
}

func (d *decoder) rafsV2(p path, r *rafsV2) {
	if r.Mode != nil {
		oneOf(&d.findings, p.at("mode"), *r.Mode, "direct", "cached")
	}
	d.amplify(p.at("batch_size"), r.BatchSize)
	d.prefetchV2(p.at("prefetch"), r.Prefetch)
}

func (d *decoder) amplify(p path, n *Size) {
	if n != nil && *n > maxRequest {
		d.add(p, "more than 256 MiB")
	}
}

// prefetch takes the table of the cache, or that of the file system where the first is off.
func prefetch(all bool, cache, fs *prefetchV2) Prefetch {
	t := cache
	if t == nil || (t.Enable == nil || !*t.Enable) && fs != nil {
		t = fs
	}
	if t == nil {
		return Prefetch{}
	}
	p := Prefetch{Enable: t.Enable, BatchSize: t.BatchSize, BandwidthLimit: t.BandwidthLimit, All: all}
	if t.Threads != nil {
		p.Threads = *t.Threads
	}
	if t.All != nil {
		p.All = *t.All
	}
	return p
}

func (d *decoder) prefetchV1(p path, t *prefetchV1) {
	d.checkPrefetch(p, (*prefetchV2)(t), "threads_count", "merging_size")
}

func (d *decoder) prefetchV2(p path, t *prefetchV2) {
	d.checkPrefetch(p, t, "threads", "batch_size")
}

func (d *decoder) checkPrefetch(p path, t *prefetchV2, threads, size string) {
	if t == nil {
		return
	}
	on := t.Enable != nil && *t.Enable
	if t.Threads != nil && (*t.Threads > maxThreads || on && *t.Threads < 1) {
		d.add(p.at(threads), "want 1 to %d", maxThreads)
	}
	if t.BatchSize > maxRequest {
		d.add(p.at(size), "more than 256 MiB")
	}
}
