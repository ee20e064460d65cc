package config

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const entryTail = `,"metadata_path":"/b"}}`

func legacy1(config string) string {
	return `{"type":"bootstrap","id":"i","config":{` + config + entryTail
}

// errorKind is the type of an entry's error.
func errorKind(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf("%T", err)
}

func TestEntryErrors(t *testing.T) {
	const fs = `"backend_type":"localfs","backend_config":{"dir":"/d"}`
	for name, c := range map[string]struct {
		in, kind, want string
	}{
		"nothing":        {``, "*config.ParseError", `Error("EOF while parsing a value", line: 1, column: 0)`},
		"cut off":        {`{"type":`, "*config.ParseError", `Error("EOF while parsing a value", line: 1, column: 8)`},
		"more behind":    {"{}\n{}", "*config.ParseError", `Error("invalid character '{' after top-level value", line: 2, column: 1)`},
		"empty":          {`{}`, "*config.ParseError", "Error(\"missing field `type`\", line: 1, column: 2)"},
		"list":           {`[]`, "*config.ParseError", `Error("invalid type: sequence, expected a map", line: 1, column: 2)`},
		"number":         {`{"type":7,"id":"i"}`, "*config.ParseError", `Error("invalid type: integer, expected a string", line: 1, column: 9)`},
		"no id":          {`{"type":"bootstrap"}`, "*config.ParseError", "Error(\"missing field `id`\", line: 1, column: 20)"},
		"twice":          {`{"type":"bootstrap","type":"bootstrap","id":"i"}`, "*config.ParseError", "Error(\"duplicate field `type`\", line: 1, column: 38)"},
		"no backend":     {legacy1(`"id":"x"`), "*config.ParseError", "Error(\"missing field `backend_type`\", line: 1, column: 69)"},
		"v2 key missing": {`{"type":"bootstrap","id":"i","config_v2":{"backend":{"type":"registry","registry":{"host":"h"}}` + entryTail, "*config.ParseError", "Error(\"missing field `repo`\", line: 1, column: 94)"},
		"v2 no backend":  {`{"type":"bootstrap","id":"i","config_v2":{"id":"x"` + entryTail, "*config.ParseError", "Error(\"missing field `backend`\", line: 1, column: 72)"},

		"no config":      {`{"type":"bootstrap","id":"i"}`, "*config.RequestError", "line 1, column 1: want config or config_v2"},
		"backend type":   {legacy1(`"backend_type":"ftp","backend_config":{}`), "*config.RequestError", `line 1, column 40: config.backend_type: unknown backend type "ftp", want registry, s3, oss, http-proxy, localfs or localdisk`},
		"v2 type":        {`{"type":"bootstrap","id":"i","config_v2":{"backend":{"type":"ftp"}` + entryTail, "*config.RequestError", `line 1, column 54: config_v2.backend.type: unknown backend type "ftp", want registry, s3, oss, http-proxy, localfs or localdisk`},
		"v2 table":       {`{"type":"bootstrap","id":"i","config_v2":{"backend":{"type":"s3"}` + entryTail, "*config.RequestError", `line 1, column 43: config_v2.backend.s3: missing`},
		"backend key":    {legacy1(`"backend_type":"registry","backend_config":{"host":"h"}`), "*config.RequestError", "line 1, column 66: config.backend_config.repo: missing"},
		"backend value":  {legacy1(`"backend_type":"localfs","backend_config":{"dir":true}`), "*config.RequestError", "line 1, column 83: config.backend_config.dir: invalid type: boolean, expected a string; line 1, column 65: config.backend_config: want dir or blob_file"},
		"auth":           {legacy1(`"backend_type":"registry","backend_config":{"host":"h","repo":"r","auth":"bWFya2Vy"}`), "*config.RequestError", "line 1, column 106: config.backend_config.auth: want base64 of user:password"},
		"threads":        {legacy1(fs + `,"prefetch_config":{"enable":true,"threads_count":0}`), "*config.RequestError", "line 1, column 128: config.prefetch_config.threads_count: want 1 to 1024"},
		"merging size":   {legacy1(fs + `,"prefetch_config":{"merging_size":268435457}`), "*config.RequestError", "line 1, column 114: config.prefetch_config.merging_size: more than 256 MiB"},
		"empty type":     {legacy1(`"backend_type":"","backend_config":{}`), "*config.RequestError", `line 1, column 40: config.backend_type: missing`},
		"cache type":     {legacy1(fs + `,"cache_type":"tape"`), "*config.RequestError", `line 1, column 95: config.cache_type: unknown cache type "tape", want blobcache, filecache or fscache`},
		"request, class": {`{"type":"datablob","id":"a/b"}`, "*config.RequestError", "line 1, column 1: want config or config_v2; line 1, column 2: type: unknown type, want bootstrap: data blobs come with it; line 1, column 20: id: want a name without slashes"},

		"type":       {`{"type":"datablob","id":"i","config":{` + fs + entryTail, "*config.InvalidError", `line 1, column 2: type: unknown type, want bootstrap: data blobs come with it`},
		"id":         {`{"type":"bootstrap","id":"","config":{` + fs + entryTail, "*config.InvalidError", "line 1, column 21: id: want a name without slashes"},
		"slashes":    {`{"type":"bootstrap","id":"a/b","domain_id":"/","config":{` + fs + entryTail, "*config.InvalidError", "line 1, column 21: id: want a name without slashes; line 1, column 32: domain_id: want a name without slashes"},
		"dummycache": {legacy1(fs + `,"cache_type":"dummycache"`), "*config.InvalidError", "line 1, column 95: config.cache_type: unknown cache type"},
		"compressed": {`{"type":"bootstrap","id":"i","config_v2":{"backend":{"type":"localfs","localfs":{"dir":"/d"}},"cache":{"type":"fscache","compressed":true}` + entryTail, "*config.InvalidError", "line 1, column 121: config_v2.cache.compressed: fscache cannot keep compressed data"},
		"bootstrap":  {`{"type":"bootstrap","id":"i","config":{` + fs + `}}`, "*config.InvalidError", "line 1, column 30: config.metadata_path: missing"},
	} {
		_, _, err := ParseBlobEntry([]byte(c.in))
		got := ""
		if p, ok := errors.AsType[*ParseError](err); ok {
			got = p.Serde()
		} else if err != nil {
			got = err.Error()
		}
		if diff := cmp.Diff([2]string{c.kind, c.want}, [2]string{errorKind(err), got}); diff != "" {
			t.Errorf("%s: error (-want +got):\n%s", name, diff)
		}
	}
}

func TestEntryAccepts(t *testing.T) {
	fs := Image{Backend: Backend{Type: TypeLocalFS, LocalFS: &LocalFS{Dir: "/d"}}}
	prefetch := fs
	prefetch.Prefetch = Prefetch{Enable: ptr(true), All: true}
	proxy := Image{Backend: Backend{Type: TypeHTTPProxy, HTTPProxy: &HTTPProxy{HTTP: defaultHTTP(), Addr: "/run/p.sock"}}}
	named := fs
	named.ID = "x"
	for name, c := range map[string]struct {
		in       string
		want     Image
		warnings int
	}{
		"legacy":          {legacy1(`"backend_type":"localfs","backend_config":{"dir":"/d","readahead":true}`), fs, 0},
		"unknown keys":    {legacy1(`"backend_type":"localfs","backend_config":{"dir":"/d","a":1},"b":2`), fs, 2},
		"nulls":           {legacy1(`"backend_type":"localfs","backend_config":{"dir":"/d","alt_dirs":null},"prefetch_config":null`), fs, 0},
		"three keys":      {legacy1(`"backend_type":"localfs","backend_config":{"dir":"/d"},"prefetch_config":{"enable":true,"threads_count":0,"merging_size":0}`), prefetch, -1},
		"one key":         {legacy1(`"backend_type":"localfs","backend_config":{"dir":"/d"},"prefetch_config":{"enable":true}`), prefetch, 0},
		"http-proxy":      {legacy1(`"backend_type":"http-proxy","backend_config":{"addr":"/run/p.sock"}`), proxy, 0},
		"second form":     {`{"type":"bootstrap","id":"i","config_v2":{"version":9,"id":"x","backend":{"type":"localfs","localfs":{"dir":"/d"}}` + entryTail, named, 0},
		"metadata_file":   {`{"type":"bootstrap","id":"i","config_v2":{"id":"x","backend":{"type":"localfs","localfs":{"dir":"/d"}},"metadata_file":"/b"}}`, named, 0},
		"both, v2 counts": {`{"type":"bootstrap","id":"i","config":{"any":1},"config_v2":{"id":"x","backend":{"type":"localfs","localfs":{"dir":"/d"}}` + entryTail, named, 0},
	} {
		got, warnings, err := ParseBlobEntry([]byte(c.in))
		if c.warnings < 0 { // refused: no requests at a time
			if errorKind(err) != "*config.RequestError" {
				t.Errorf("%s: error %v", name, err)
			}
			continue
		}
		want := BlobEntry{Type: "bootstrap", ID: "i", Bootstrap: "/b", Image: c.want}
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: error %v, entry (-want +got):\n%s", name, err, diff)
		}
		state, err := got.MarshalState()
		if err != nil {
			t.Fatal(err)
		}
		back, _, err := ParseBlobEntry(state)
		if diff := cmp.Diff(got, back); err != nil || diff != "" {
			t.Errorf("%s: saved and read again: error %v, entry (-before +after):\n%s", name, err, diff)
		}
		if len(warnings) != c.warnings {
			t.Errorf("%s: warnings %q, want %d", name, warnings, c.warnings)
		}
	}
}

func TestDaemonFile(t *testing.T) {
	entry := legacy1(`"backend_type":"localfs","backend_config":{"dir":"/d"}`)
	for in, want := range map[string]struct {
		entries int
		err     string
	}{
		`{}`:                {0, ""},
		`{"blobs":null}`:    {0, ""},
		`{"anything":[{}]}`: {0, ""},
		`{"blobs":[` + entry + `,` + entry + `]}`: {2, ""},
		`{"blobs":[` + entry + `,{}]}`:            {0, "line 1, column 128: blobs[1].type: missing; line 1, column 128: blobs[1].id: missing; line 1, column 128: blobs[1]: want config or config_v2"},
		`{"blobs":[` + entry + `,7], "a":1}`:      {0, "line 1, column 128: blobs[1]: invalid type: integer, expected a map"},
		`{"blobs":{}}`:                            {0, "line 1, column 2: blobs: invalid type: map, expected a sequence"},
		`[]`:                                      {0, "line 1, column 1: invalid type: sequence, expected a map"},
		`blobs = []`:                              {0, "line 1, column 1: invalid character 'b' looking for beginning of value"},
	} {
		entries, _, err := ParseDaemonFile([]byte(in))
		got := ""
		if err != nil {
			got = err.Error()
		}
		if len(entries) != want.entries || got != want.err {
			t.Errorf("%s: %d entries, error %q; want %d, %q", in, len(entries), got, want.entries, want.err)
		}
	}
}
