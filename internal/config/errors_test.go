package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// texts is each of the joined errors.
func texts(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

const v2Head = "version = 2\n[backend]\n"

// TestNydusErrors is for both of nydus's forms: what is wrong, all of it, and where.
func TestNydusErrors(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want []string
	}{
		"v1 wrong type": {
			`{"device":{"backend":{"type":"localfs","config":{"dir":7}}},"mode":"direct"}`,
			[]string{
				"line 1, column 50: device.backend.config.dir: invalid type: integer, expected a string",
				"line 1, column 40: device.backend.config: want dir or blob_file",
			},
		},
		"v1 unknown type": {
			`{"device":{"backend":{"type":"ftp","config":{}}},"mode":"direct"}`,
			[]string{`line 1, column 23: device.backend.type: unknown backend type "ftp", want registry, s3, oss, http-proxy, localfs or localdisk`},
		},
		"v1 missing key": {
			"{\"device\":{\"backend\":{\"type\":\"registry\",\n\"config\":{\"host\":\"h\"}}},\"mode\":\"direct\"}",
			[]string{"line 2, column 1: device.backend.config.repo: missing"},
		},
		"v1 two problems": {
			"{\"device\":{\"backend\":{\"type\":\"localdisk\",\"config\":{}},\n\"cache\":{\"type\":\"tapecache\"}},\n\"mode\":\"direct\"}",
			[]string{
				"line 1, column 42: device.backend.config.device_path: missing",
				`line 2, column 10: device.cache.type: unknown cache type "tapecache", want blobcache, filecache or fscache`,
			},
		},
		"v1 everything missing": {
			`{"device":{}}`,
			[]string{"line 1, column 2: device.backend: missing", "line 1, column 1: mode: missing"},
		},
		"v1 values": {
			`{"device":{"backend":{"type":"localfs","config":{"dir":"/d"}},
			"cache":{"type":"fscache","compressed":true,"config":{"work_dir":""}}},
			"mode":"fast","amplify_io":268435457,
			"fs_prefetch":{"enable":true,"threads_count":0,"merging_size":268435457}}`,
			[]string{
				"line 2, column 30: device.cache.compressed: fscache cannot keep compressed data",
				"line 2, column 58: device.cache.config.work_dir: empty",
				`line 3, column 4: mode: unknown mode "fast", want direct, cached`,
				"line 3, column 18: amplify_io: more than 256 MiB",
				"line 4, column 33: fs_prefetch.threads_count: want 1 to 1024",
				"line 4, column 51: fs_prefetch.merging_size: more than 256 MiB",
			},
		},
		"v2 wrong type": {
			v2Head + "type = \"localfs\"\n[backend.localfs]\ndir = 7\n",
			[]string{
				"line 4, column 10: backend.localfs: want dir or blob_file",
				"line 5, column 1: backend.localfs.dir: invalid type: integer, expected a string",
			},
		},
		"v2 unknown type": {
			v2Head + "type = \"ftp\"\n",
			[]string{`line 3, column 1: backend.type: unknown backend type "ftp", want registry, s3, oss, http-proxy, localfs or localdisk`},
		},
		"v2 missing key": {
			v2Head + "type = \"registry\"\n[backend.registry]\nhost = \"h\"\n",
			[]string{"line 4, column 10: backend.registry.repo: missing"},
		},
		"v2 two problems": {
			"version = 3\n[backend]\ntype = \"oss\"\noss = { bucket_name = \"b\" }\n",
			[]string{"line 1, column 1: version: want 2", "line 4, column 1: backend.oss.endpoint: missing"},
		},
		"v2 missing table": {
			v2Head + "type = \"s3\"\n",
			[]string{"line 2, column 2: backend.s3: missing"},
		},
		"v2 everything missing": {
			"id = \"i\"\n",
			[]string{"line 1, column 1: version: missing", "line 1, column 1: backend: missing"},
		},
		"v2 values": {
			v2Head + `type = "registry"
[backend.registry]
scheme = "gopher"
host = "http://h/"
repo = "r"
auth = "c2VjcmV0LW1hcmtlcg=="
retry_limit = 256
proxy = { url = "nowhere", ping_url = "http://u:p@h" }
timeout = -1
[[backend.registry.mirrors]]
failure_limit = 0
[rafs]
mode = "slow"
[cache.prefetch]
enable = true
threads = 1025
`,
			[]string{
				`line 5, column 1: backend.registry.scheme: unknown scheme "gopher", want https, http`,
				"line 6, column 1: backend.registry.host: want host or host:port, without a scheme, a login and a path",
				"line 8, column 1: backend.registry.auth: want base64 of user:password",
				"line 9, column 1: backend.registry.retry_limit: want 0 to 255",
				"line 10, column 11: backend.registry.proxy.url: want http://host or https://host",
				"line 10, column 28: backend.registry.proxy.ping_url: a login is not taken from this URL",
				"line 11, column 1: backend.registry.timeout: invalid value: integer, expected 0 to 3153600000",
				"line 12, column 20: backend.registry.mirrors[0].host: missing",
				"line 13, column 1: backend.registry.mirrors[0].failure_limit: want at least 1",
				`line 15, column 1: rafs.mode: unknown mode "slow", want direct, cached`,
				"line 18, column 1: cache.prefetch.threads: want 1 to 1024",
			},
		},
		"neither":        {`[]`, []string{`line 1, column 2: invalid character at start of key: U+005D ']'`}},
		"no JSON":        {"{\n\"a\": tru}", []string{"line 2, column 9: invalid character '}' in literal true (expecting 'e')"}},
		"cut off":        {`{"device":`, []string{"line 1, column 10: EOF while parsing a value"}},
		"nothing":        {" \n", []string{"line 2, column 0: EOF while parsing a value"}},
		"no TOML":        {"version = 2\nid = x\n", []string{"line 2, column 6: unexpected character U+0078 'x' at start of value"}},
		"duplicate":      {`{"version":2,"version":2,"backend":{"type":"localfs","localfs":{"dir":"/"}}}`, []string{"line 1, column 14: version: duplicate field `version`"}},
		"too large":      {"#" + strings.Repeat("x", maxFile), []string{"line 1, column 1: the document is larger than 1 MiB"}},
		"too large JSON": {"{" + strings.Repeat(" ", maxFile), []string{"line 1, column 0: the document is larger than 1 MiB"}},
		"too deep":       {strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100), []string{"line 1, column 326: values lie too deep in each other"}},
	} {
		i, _, err := ParseNydus([]byte(c.in))
		got, want := slices.Sorted(slices.Values(texts(err))), slices.Sorted(slices.Values(c.want))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: errors (-want +got):\n%s", name, diff)
		}
		if err != nil && !i.Equal(Image{}) {
			t.Errorf("%s: an error and an image", name)
		}
	}
}

func TestNydusWarnings(t *testing.T) {
	in := v2Head + `type = "localfs"
vault = 1
[backend.localfs]
dir = "/d"
readahead = true
[backend.s3]
region = "r"
[[external_backends]]
type = "x"
[cache]
type = "dummycache"
compressed = true
[cache.filecache]
enable_encryption = true
encryption_key = "marker"
[overlay]
upper_dir = "/u"
`
	want := []string{
		"line 4, column 1: backend.vault: unknown key",
		"line 8, column 10: backend.s3: has no effect: the type of the backend is localfs",
		"line 10, column 3: external_backends: has no effect: external backends are not read",
		"line 13, column 1: cache.type: has no effect: what is fetched is kept",
		"line 14, column 1: cache.compressed: has no effect: data is kept uncompressed",
		"line 15, column 8: cache.filecache: encryption has no effect: the cache is not encrypted",
		"line 18, column 2: overlay: has no effect: images are mounted read-only",
	}
	i, got, err := ParseNydus([]byte(in))
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v, warnings (-want +got):\n%s", err, diff)
	}
	if want := (Backend{Type: TypeLocalFS, LocalFS: &LocalFS{Dir: "/d"}}); !i.Backend.Equal(want) {
		t.Errorf("backend %+v, want %+v", i.Backend, want)
	}
}

func TestPrefetch(t *testing.T) {
	on, off := ptr(true), ptr(false)
	for tables, want := range map[string]Prefetch{
		``:                                       {},
		`,"cache":{"prefetch":{}}`:               {},
		`,"cache":{"prefetch":{"enable":false}}`: {Enable: off},
		`,"rafs":{"prefetch":{"enable":true}}`:   {Enable: on},
		`,"cache":{"prefetch":{"enable":false,"threads":9}},"rafs":{"prefetch":{"enable":true,"threads":3}}`: {Enable: on, Threads: 3},
		`,"cache":{"prefetch":{"enable":true,"threads":9}},"rafs":{"prefetch":{"enable":true,"threads":3}}`:  {Enable: on, Threads: 9},
	} {
		i, _, err := ParseNydus([]byte(`{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/d"}}` + tables + `}`))
		if diff := cmp.Diff(want, i.Prefetch); err != nil || diff != "" {
			t.Errorf("%s: %v, prefetch (-want +got):\n%s", tables, err, diff)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	const in = `[daemon]
rooot = "/r"
fill_timeout = 60
transport = "fuse"
[log]
level = "loud"
rotation_size = "10 GB"
[metrics]
address = "9090"
[cachefiles]
threads = 0
tag = "a b"
[cache]
high = "1GiB"
low = "2GiB"
[image]
amplify = "1GiB"
[image.backend]
type = "registry"
[image.backend.registry]
repo = "library/app"
auth = "dXNlcjptYXJrZXI="
registry_token = "marker"
token_file = "missing"
timeout = "5"
headers = { Authorization = "marker" }
[[image.backend.registry.mirrors]]
host = "a"
[[image.backend.registry.mirrors]]
host = "b"
hosts = "c"
[image.backend.s3]
region = "r"
`
	dir := t.TempDir()
	file := filepath.Join(dir, "erofsd.toml")
	if err := os.WriteFile(file, []byte(in), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"2:1: daemon.rooot: unknown key",
		`3:1: daemon.fill_timeout: invalid type: integer, expected a duration as "5s"`,
		`4:1: daemon.transport: unknown transport "fuse", want auto, fanotify, cachefiles`,
		`6:1: log.level: unknown level "loud", want off, error, warn, info, debug, trace`,
		"7:1: log.rotation_size: want a size as 10GiB, 512KiB or a number of bytes",
		"9:1: metrics.address: want host:port",
		"11:1: cachefiles.threads: want 1 to 1024",
		"12:1: cachefiles.tag: want a name without spaces and slashes",
		"15:1: cache.low: more than cache.high",
		"17:1: image.amplify: more than 256 MiB",
		"20:16: image.backend.registry.host: missing",
		"22:1: image.backend.registry.auth: a secret is not written here: put it into a file that others cannot read and name that with auth_file",
		"23:1: image.backend.registry.registry_token: a secret is not written here: put it into a file that others cannot read and name that with token_file",
		"24:1: image.backend.registry.token_file: read secret: open " + filepath.Join(dir, "missing") + ": no such file or directory",
		"25:1: image.backend.registry.timeout: want a duration as 5s or 1m30s",
		"26:13: image.backend.registry.headers.Authorization: a secret is not written here: say it with auth_file or token_file",
		"31:1: image.backend.registry.mirrors[1].hosts: unknown key",
		`32:16: image.backend.s3: the type of the backend is "registry", so this has no effect`,
	}
	for i := range want {
		want[i] = file + ":" + want[i]
	}
	_, err := Load(file)
	if diff := cmp.Diff(want, texts(err)); diff != "" {
		t.Errorf("errors (-want +got):\n%s", diff)
	}
	if p, ok := errors.AsType[Problem](err); !ok || p.Line != 2 || p.Key != "daemon.rooot" || p.File != file {
		t.Errorf("the first problem is %+v", p)
	}

	for text, want := range map[string]string{
		"[daemon\n":      file + ":1:8: expected ']' to close table name",
		"a = 1\na = 2\n": file + ":2:1: key a is already defined",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(file); err == nil || err.Error() != want {
			t.Errorf("%q: error %v, want %s", text, err, want)
		}
	}
	if _, err := Load(filepath.Join(dir, "none.toml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestSecretFiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "s")
	for _, c := range []struct {
		text, want, wrong string
		mode              os.FileMode
	}{
		{"marker\n", "marker", "", 0o600},
		{"marker", "marker", "", 0o440},
		{"marker", "", "everybody can read or change", 0o604},
		{"marker", "", "everybody can read or change", 0o602},
		{"\n", "", "is empty", 0o600},
		{strings.Repeat("x", maxSecret+1), "", "larger than", 0o600},
	} {
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, c.mode); err != nil {
			t.Fatal(err)
		}
		got, err := readSecret(file)
		if got.Reveal() != c.want || (err == nil) != (c.wrong == "") || err != nil && !strings.Contains(err.Error(), c.wrong) {
			t.Errorf("mode %o: %q, error %v; want %q, error with %q", c.mode, got.Reveal(), err, c.want, c.wrong)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := readSecret(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory as secret: %v", err)
	}
}

func TestValidate(t *testing.T) {
	c := Default()
	if err := c.Validate(); err != nil {
		t.Errorf("the default: %v", err)
	}
	c.Daemon.Root, c.Log.Format, c.Log.RotationKeep, c.Daemon.FillTimeout = "", "xml", 0, 0
	c.Image.Backend = Backend{Type: TypeRegistry, Registry: &Registry{Repo: "r"}}
	want := []string{
		"daemon.root: missing",
		"daemon.fill_timeout: want more than 0s",
		`log.format: unknown format "xml", want text, json`,
		"log.rotation_keep: want at least 1",
		"image.backend.registry.host: missing",
	}
	if diff := cmp.Diff(want, texts(c.Validate())); diff != "" {
		t.Errorf("errors (-want +got):\n%s", diff)
	}
	c = Default()
	c.Image.Backend = Backend{Type: TypeRegistry, Registry: &Registry{HTTP: defaultHTTP()}}
	if err := c.Validate(); err != nil {
		t.Errorf("a registry for images that bring their names: %v", err)
	}
}
