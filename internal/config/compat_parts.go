package config

import "reflect"

// addressed is the settable value of the struct that v points to.
func addressed[T any](v *T) reflect.Value { return reflect.ValueOf(v).Elem() }

// flatBackend decodes nydus's flat form: a type, and a table of its keys.
func (d *decoder) flatBackend(i *Image, kind string, kindAt path, table *node, at path) {
	i.Backend.Type = kind
	if table == nil {
		return // found missing already
	}
	var check func()
	switch kind {
	case TypeRegistry:
		i.Backend.Registry = decoded[Registry](d, table, at)
		check = func() { i.Backend.Registry.check(&d.findings, at, false) }
	case TypeS3:
		i.Backend.S3 = decoded[S3](d, table, at)
		check = func() { i.Backend.S3.check(&d.findings, at) }
	case TypeOSS:
		i.Backend.OSS = decoded[OSS](d, table, at)
		check = func() { i.Backend.OSS.check(&d.findings, at) }
	case TypeHTTPProxy:
		i.Backend.HTTPProxy = decoded[HTTPProxy](d, table, at)
		check = func() { i.Backend.HTTPProxy.check(&d.findings, at) }
	case TypeLocalFS:
		i.Backend.LocalFS = decoded[LocalFS](d, table, at)
		check = func() { i.Backend.LocalFS.check(&d.findings, at) }
	case TypeLocalDisk:
		i.Backend.LocalDisk = decoded[LocalDisk](d, table, at)
		check = func() { i.Backend.LocalDisk.check(&d.findings, at) }
	case "":
		d.missing(kindAt)
		return
	default:
		d.unknownType(kindAt, kind)
		return
	}
	if table.kind == kindObject {
		check()
	}
}

// decoded is a T as n says, on top of its defaults.
func decoded[T any](d *decoder, n *node, p path) *T {
	v := newValue(reflect.TypeFor[T]())
	d.value(n, p, v.Elem())
	return v.Interface().(*T)
}

// tableBackend checks the backend of nydus's second form. A key that must be there
// belongs to the document's shape, as nydusd has it.
func (d *decoder) tableBackend(i *Image, b *Backend, at path) {
	if b == nil {
		return // found missing already
	}
	i.Backend = *b
	if b.Type == "" {
		d.missing(at.at("type"))
		return
	}
	known := len(d.list)
	before := d.class
	d.class = max(d.class, classRequest)
	i.Backend.check(&d.findings, at, false)
	d.class = before
	for n := range d.list[known:] {
		if f := &d.list[known+n]; f.missing && len(f.path) > len(at)+1 {
			f.class = classParse
		}
	}
}

func (d *decoder) external(p path, backends []*node) {
	if len(backends) > 0 {
		d.warn(p, "has no effect: external backends are not read")
	}
}

// cacheType checks what nydus knows of caches; key is what the type is called at p.
func (d *decoder) cacheType(p path, key, kind string, compressed bool) {
	before := d.class
	defer func() { d.class = before }()
	switch kind {
	case "", "blobcache", "filecache", "fscache":
	case "dummycache":
		d.dummyCache(p.at(key))
	default:
		d.class = max(d.class, classRequest)
		d.add(p.at(key), "unknown cache type %q, want blobcache, filecache or fscache", shown(kind))
	}
	if compressed && kind == "fscache" {
		d.class = max(d.class, classInvalid)
		d.add(p.at("compressed"), "fscache cannot keep compressed data")
	} else if compressed {
		d.warn(p.at("compressed"), "has no effect: data is kept uncompressed")
	}
}

// dummyCache is nydus's way to keep nothing: a file accepts it, a blob entry does not.
func (d *decoder) dummyCache(p path) {
	if d.entry {
		d.class = classInvalid
		d.add(p, "unknown cache type")
		return
	}
	d.warn(p, "has no effect: what is fetched is kept")
}

// workDir returns the directory of a cache's table; "" when it names none.
func (d *decoder) workDir(p path, c *cacheConfig) string {
	if c == nil {
		return ""
	}
	if c.Encrypt || c.EncryptConvergent || c.EncryptionKey != "" {
		d.warn(p, "encryption has no effect: the cache is not encrypted")
	}
	if c.WorkDir == nil {
		return ""
	}
	if *c.WorkDir == "" {
		d.add(p.at("work_dir"), "empty")
	}
	return *c.WorkDir
}
