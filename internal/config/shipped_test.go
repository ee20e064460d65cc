package config

import (
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/erofsd/erofsd/internal/testenv"
)

// shipped is configs/erofsd.toml.
func shipped(t *testing.T) []byte {
	return readFile(t, filepath.Join(testenv.ModuleRoot(t), "configs", "erofsd.toml"))
}

// uncommented is configs/erofsd.toml with every key in force.
func uncommented(t *testing.T) []byte {
	return regexp.MustCompile(`(?m)^#([a-z\[])`).ReplaceAll(shipped(t), []byte("$1"))
}

func TestShippedIsDefault(t *testing.T) {
	got, err := decodeOwn(shipped(t), "erofsd.toml", readSecret)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("configuration (-default +shipped):\n%s", diff)
	}
}

// TestShippedHasDefaults uncomments every key and wants what is there to be the default
// of each, but for those whose default no value says.
func TestShippedHasDefaults(t *testing.T) {
	root, err := parseTOML(uncommented(t))
	if err != nil {
		t.Fatal(err)
	}
	d := &decoder{own: true, secret: readSecret}
	got := Default()
	d.object(root, nil, addressed(&got))
	if err := d.err(root, "erofsd.toml"); err != nil {
		t.Fatal(err)
	}
	b := &got.Image.Backend
	mirror := Mirror{Host: "mirror.example:5000"}
	mirror.setDefaults()
	if diff := cmp.Diff([]Mirror{mirror}, b.Registry.Mirrors); diff != "" {
		t.Errorf("mirrors (-default +shipped):\n%s", diff)
	}
	if got.Image.Amplify == nil || got.Image.Prefetch.Enable == nil || b.Registry.RetryLimit == nil {
		t.Error("amplify, enable and retry_limit want an example")
	}
	got.Image.Amplify, got.Image.Prefetch.Enable, b.Registry.RetryLimit, b.Registry.Mirrors = nil, nil, nil, nil

	want := Default()
	want.Image.Backend = Backend{
		Registry: &Registry{HTTP: defaultHTTP()}, HTTPProxy: &HTTPProxy{HTTP: defaultHTTP()},
		S3:      &S3{HTTP: defaultHTTP(), Scheme: "https"},
		OSS:     &OSS{HTTP: defaultHTTP(), Scheme: "https"},
		LocalFS: &LocalFS{}, LocalDisk: &LocalDisk{},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("configuration (-default +shipped):\n%s", diff)
	}
}

// TestShippedHasEveryKey looks for each key of the structs. Those that all backends over
// HTTP share are there once, for the registry.
func TestShippedHasEveryKey(t *testing.T) {
	root, err := parseTOML(uncommented(t))
	if err != nil {
		t.Fatal(err)
	}
	keys := 0
	eachKey(reflect.TypeFor[Config](), nil, func(p path) {
		keys++
		if _, found := root.find(p); !found {
			t.Errorf("configs/erofsd.toml does not have %s", p)
		}
	})
	if keys < 80 {
		t.Errorf("the structs have only %d keys: this looks at too few", keys)
	}
}

func eachKey(s reflect.Type, p path, visit func(path)) {
	d := decoder{own: true}
	for i := range s.NumField() {
		field := s.Field(i)
		of := field.Type
		key, _ := d.key(field)
		switch {
		case field.Anonymous:
			if strings.HasSuffix(p.String(), TypeRegistry) {
				eachKey(of, p, visit)
			}
			continue
		case key == "-":
			continue
		case of == reflect.TypeFor[Secret]():
			key += "_file"
		}
		at := p.at(key)
		visit(at)
		if of.Kind() == reflect.Slice && of.Elem().Kind() == reflect.Struct {
			of, at = of.Elem(), at.index(0)
		}
		if of.Kind() == reflect.Pointer {
			of = of.Elem()
		}
		if of.Kind() == reflect.Struct {
			eachKey(of, at, visit)
		}
	}
}

// TestNydusSamples reads the samples of nydus's forms as their users do. That of
// nydus-snapshotter is a template: it puts the image's own keys in.
func TestNydusSamples(t *testing.T) {
	dir := filepath.Join(testenv.ModuleRoot(t), "configs")
	for name, kind := range map[string]string{"nydusd-config.json": TypeRegistry, "nydusd-config-v2.toml": TypeOSS} {
		i, warnings, err := ParseNydus(readFile(t, filepath.Join(dir, name)))
		if err != nil || len(warnings) > 0 || i.Backend.Type != kind {
			t.Errorf("%s: backend %q, warnings %q, error %v", name, i.Backend.Type, warnings, err)
		}
	}
	entries, warnings, err := ParseDaemonFile(readFile(t, filepath.Join(dir, "nydusd-config.singleton.json")))
	if err != nil || len(warnings) > 0 || len(entries) != 2 {
		t.Errorf("singleton: %d entries, warnings %q, error %v", len(entries), warnings, err)
	}
	template := string(readFile(t, filepath.Join(dir, "nydusd-config.fscache.json")))
	image := strings.NewReplacer(
		`"type": "bootstrap",`, `"type": "bootstrap", "id": "i", "domain_id": "i",`,
		`"backend_config": {`, `"backend_config": { "host": "h", "repo": "r", "auth": "dTpw",`,
		`"cache_type"`, `"id": "i", "metadata_path": "/b", "cache_config": {"work_dir": "/w"}, "cache_type"`,
	).Replace(template)
	e, warnings, err := ParseBlobEntry([]byte(image))
	if err != nil || len(warnings) > 0 || e.Image.WorkDir != "/w" || *e.Image.Backend.Registry.RetryLimit != 4 {
		t.Errorf("fscache: entry %v, warnings %q, error %v", e, warnings, err)
	}
}
