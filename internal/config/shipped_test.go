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
