package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// A BlobEntry is an image as nydusd's API, its --config and its saved state name it.
type BlobEntry struct {
	Type      string // "bootstrap"
	ID        string // the fsid of the mount
	DomainID  string // scope in which blobs are shared; "": the image's own
	Image     Image
	Bootstrap string // path of the bootstrap (metadata_path)
}

// entryJSON is a blob entry with either form of its configuration.
type entryJSON struct {
	Type     string `key:"type,required"`
	ID       string `key:"id,required"`
	DomainID string `key:"domain_id"`
	Config   *node  `key:"config"`
	ConfigV2 *node  `key:"config_v2"`
}

// entryV1 is the legacy configuration of an entry.
type entryV1 struct {
	ID            string      `key:"id"`
	BackendType   string      `key:"backend_type,required"`
	BackendConfig *node       `key:"backend_config,required"`
	External      []*node     `key:"external_backends"`
	CacheType     string      `key:"cache_type"`
	CacheConfig   cacheConfig `key:"cache_config"`
	Prefetch      *prefetchV1 `key:"prefetch_config"`
	Metadata      string      `key:"metadata_path"`
}

// entryV2 is the configuration of an entry in the second form. The key metadata_file is
// from nydus's own sample.
type entryV2 struct {
	Version      int      `key:"version"` // whatever it is
	ID           string   `key:"id"`
	Backend      *Backend `key:"backend,required"`
	External     []*node  `key:"external_backends"`
	Cache        *cacheV2 `key:"cache"`
	Rafs         rafsV2   `key:"rafs"`
	Metadata     string   `key:"metadata_path"`
	MetadataFile string   `key:"metadata_file"`
}

// A ParseError is an entry that does not have the shape of one: no JSON, a field that is
// missing or has the wrong type. nydusd's API says ParseBody.
type ParseError struct {
	Line, Column int    // of the first problem, counted as serde does
	Message      string // the first problem in serde's words: missing field `type`
	Problems     []Problem
}

func (e *ParseError) Error() string { return joined(e.Problems) }

// Serde is the error as nydusd writes it:
// Error("missing field `type`", line: 1, column: 2).
func (e *ParseError) Serde() string {
	return fmt.Sprintf("Error(%q, line: %d, column: %d)", e.Message, e.Line, e.Column)
}

// A RequestError is an entry with a configuration that cannot be. nydusd's API says
// BadRequest.
type RequestError struct{ Problems []Problem }

func (e *RequestError) Error() string { return joined(e.Problems) }

// An InvalidError is an entry that cannot be registered: its type, its names or its
// cache. nydusd's API answers 500.
type InvalidError struct{ Problems []Problem }

func (e *InvalidError) Error() string { return joined(e.Problems) }

func joined(list []Problem) string {
	texts := make([]string, len(list))
	for i, p := range list {
		texts[i] = p.Error()
	}
	return strings.Join(texts, "; ")
}

// ParseBlobEntry reads one blob entry. Unknown keys are texts of the second result. The
// error is a *[ParseError], *[RequestError] or *[InvalidError], the first of these that
// applies, and tells everything that is wrong.
func ParseBlobEntry(data []byte) (BlobEntry, []string, error) {
	d := &decoder{entry: true}
	root, err := parseJSON(data, &d.findings)
	if err != nil {
		return BlobEntry{}, nil, parseError(err)
	}
	e := d.blobEntry(root, nil)
	if len(d.list) > 0 {
		return BlobEntry{}, d.warned(root), entryError(d.list, root)
	}
	return e, d.warned(root), nil
}

// ParseDaemonFile reads what nydusd singleton takes as --config: a JSON object whose
// blobs, if it has them, are blob entries. Other keys are not looked at. The error is a
// *[ParseError], *[RequestError] or *[InvalidError].
func ParseDaemonFile(data []byte) ([]BlobEntry, []string, error) {
	d := &decoder{entry: true}
	root, err := parseJSON(data, &d.findings)
	if err != nil {
		return nil, nil, parseError(err)
	}
	var entries []BlobEntry
	if d.want(root, nil, kindObject, "a map") {
		blobs := root.field("blobs")
		if blobs == nil {
			return nil, nil, nil
		}
		at := path{"blobs"}
		if d.want(blobs, at, kindList, "a sequence") {
			for i, n := range blobs.list {
				entries = append(entries, d.blobEntry(n, at.index(i)))
			}
		}
	}
	if len(d.list) > 0 {
		return nil, d.warned(root), entryError(d.list, root)
	}
	return entries, d.warned(root), nil
}

func (d *decoder) blobEntry(n *node, p path) BlobEntry {
	var j entryJSON
	d.class = classParse
	d.object(n, p, addressed(&j))
	e := BlobEntry{Type: j.Type, ID: j.ID, DomainID: j.DomainID}
	config := "config"
	switch {
	case j.ConfigV2 != nil:
		config = "config_v2"
		d.entryV2(&e, j.ConfigV2, p.at(config))
	case j.Config != nil:
		d.entryV1(&e, j.Config, p.at(config))
	case n.kind == kindObject:
		d.class = classRequest
		d.add(p, "want config or config_v2")
	}
	if n.kind != kindObject {
		return e
	}
	d.class = classInvalid
	if n.field("type") != nil && e.Type != "bootstrap" {
		d.add(p.at("type"), "unknown type, want bootstrap: data blobs come with it")
	}
	if n.field("id") != nil && (e.ID == "" || strings.Contains(e.ID, "/")) {
		d.add(p.at("id"), "want a name without slashes")
	}
	if strings.Contains(e.DomainID, "/") {
		d.add(p.at("domain_id"), "want a name without slashes")
	}
	if e.Bootstrap == "" && n.field(config) != nil {
		d.missing(p.at(config, "metadata_path"))
	}
	return e
}

func (d *decoder) entryV1(e *BlobEntry, n *node, p path) {
	var c entryV1
	d.object(n, p, addressed(&c))
	e.Bootstrap = c.Metadata
	i := &e.Image
	i.ID = c.ID
	d.class = classRequest
	d.flatBackend(i, c.BackendType, p.at("backend_type"), c.BackendConfig, p.at("backend_config"))
	d.external(p.at("external_backends"), c.External)
	d.cacheType(p, "cache_type", c.CacheType, false)
	i.WorkDir = d.workDir(p.at("cache_config"), &c.CacheConfig)
	d.prefetchV1(p.at("prefetch_config"), c.Prefetch)
	i.Prefetch = prefetch(true, (*prefetchV2)(c.Prefetch), nil)
}

func (d *decoder) entryV2(e *BlobEntry, n *node, p path) {
	c := entryV2{Cache: &cacheV2{}}
	d.object(n, p, addressed(&c))
	e.Bootstrap = cmp.Or(c.Metadata, c.MetadataFile)
	i := &e.Image
	i.ID, i.Amplify = c.ID, c.Rafs.BatchSize
	d.tableBackend(i, c.Backend, p.at("backend"))
	d.class = classRequest
	d.external(p.at("external_backends"), c.External)
	i.WorkDir = d.cacheV2(p.at("cache"), c.Cache)
	d.rafsV2(p.at("rafs"), &c.Rafs)
	i.Prefetch = prefetch(false, c.Cache.Prefetch, c.Rafs.Prefetch)
}

// parseError is the ParseError of a document that is none.
func parseError(err error) error {
	s, ok := err.(*syntaxError)
	if !ok {
		return &ParseError{Message: "not JSON", Problems: []Problem{{Text: "not JSON"}}}
	}
	return &ParseError{
		Line: s.line, Column: s.column, Message: s.text,
		Problems: []Problem{{Line: s.line, Column: s.column, Text: s.text}},
	}
}

// entryError is the error of the class that nydusd would meet first. It tells the
// problems of the other classes too, after those.
func entryError(list []finding, root *node) error {
	slices.SortStableFunc(list, func(a, b finding) int { return cmp.Compare(a.class, b.class) })
	var all []Problem
	for c := classParse; c <= classInvalid; c++ {
		same := slices.DeleteFunc(slices.Clone(list), func(f finding) bool { return f.class != c })
		all = append(all, problems(same, root, "")...)
	}
	first := list[0]
	switch first.class {
	case classRequest:
		return &RequestError{all}
	case classInvalid:
		return &InvalidError{all}
	}
	e := &ParseError{Message: first.text, Problems: all}
	n, _ := root.find(first.path)
	if first.missing {
		e.Message = "missing field `" + first.path[len(first.path)-1] + "`"
	}
	e.Line, e.Column = n.end.line, n.end.column
	return e
}
