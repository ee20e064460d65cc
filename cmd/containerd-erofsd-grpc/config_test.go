package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"text/template"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) {
	if isPart(os.Args) {
		os.Exit(part(os.Args))
	}
	testenv.Main(m)
}

// shipped is the configuration that comes with the program.
func shipped(t *testing.T) string {
	return filepath.Join(testenv.ModuleRoot(t), "configs", "containerd-erofsd.toml")
}

// TestShipped wants every key there, with its default.
func TestShipped(t *testing.T) {
	got, warnings, err := loadConfig(shipped(t), origin{})
	if err != nil {
		t.Fatal(err)
	}
	if len(warnings) > 0 {
		t.Errorf("warnings %q", warnings)
	}
	if diff := cmp.Diff(defaultConfig(), got); diff != "" {
		t.Errorf("configuration (-default +shipped):\n%s", diff)
	}
	text, err := os.ReadFile(shipped(t))
	if err != nil {
		t.Fatal(err)
	}
	var tree map[string]any
	if err := toml.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	if n := missingKeys(t, reflect.TypeFor[config](), tree, ""); n < 20 {
		t.Errorf("only %d keys were looked for", n)
	}
}

// A containerdSnippet is what is looked at of a configuration of containerd's.
type containerdSnippet struct {
	Version int
	Plugins map[string]struct {
		Type, Address string
		Exports       map[string]string
	} `toml:"proxy_plugins"`
}

// TestContainerdSnippets wants containerd to be sent to where the snapshotter is, and to
// nobody else.
func TestContainerdSnippets(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(testenv.ModuleRoot(t), "configs", "containerd", "*"))
	if err != nil || len(files) < 6 {
		t.Fatalf("only %q, %v", files, err)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var filled bytes.Buffer // those of k3s are templates
		base := template.Must(template.New("").Parse(`{{ define "base" }}version = 3{{ end }}`))
		err = template.Must(base.Parse(string(text))).Execute(&filled, struct{ SystemdCgroup bool }{true})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var c containerdSnippet
		if err := toml.Unmarshal(filled.Bytes(), &c); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, filled.String())
		}
		p, want := c.Plugins["erofsd"], defaultConfig()
		if c.Version == 0 || p.Type != "snapshot" || p.Address != want.Address || p.Exports != nil && p.Exports["root"] != want.Root {
			t.Errorf("%s: %+v, want %s and %s", name, c, want.Address, want.Root)
		}
		if users := strings.Count(filled.String(), `snapshotter = "erofsd"`); users == 0 || strings.Count(filled.String(), "snapshotter =") != users {
			t.Errorf("%s: nobody uses the snapshotter, or another one", name)
		}
	}
}

// missingKeys reports the keys of s that tree does not have and returns how many it looked for.
func missingKeys(t *testing.T, s reflect.Type, tree map[string]any, at string) (n int) {
	for i := range s.NumField() {
		key := s.Field(i).Tag.Get("toml")
		v, ok := tree[key]
		if !ok {
			t.Errorf("configs/containerd-erofsd.toml does not have %s%s", at, key)
		}
		n++
		if s.Field(i).Type.Kind() == reflect.Struct {
			inner, _ := v.(map[string]any)
			n += missingKeys(t, s.Field(i).Type, inner, at+key+".")
		}
	}
	return n
}

// TestBadConfig names what is wrong, all of it.
func TestBadConfig(t *testing.T) {
	for text, wants := range map[string][]string{
		"rot = \"/x\"\n[daemon]\nmod = 1": {"rot", "mod"},
		"root = 5":                        {"root"},
		"root = \"relative\"\naddress = \"/" + strings.Repeat("x", 107) + "\"\n[daemon]\nmode = \"perhaps\"\n[images]\nshare = \"some\"\n[backend]\ncredentials = \"mine\"": {
			"root: ", "address: ", "daemon.mode", "images.share", "backend.credentials",
		},
		"[daemon]\nmode = \"embedded\"\nexecutable = \"/opt/erofsd\"":                     {"daemon.executable", "/opt/erofsd"},
		"[daemon]\nmode = \"embedded\"\nsocket = \"/" + strings.Repeat("x", 100) + "/s\"": {"daemon.socket", storeName},
	} {
		name := filepath.Join(t.TempDir(), "c.toml")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, err := loadConfig(name, origin{})
		if err == nil {
			t.Errorf("%q is accepted", text)
			continue
		}
		for _, want := range append(wants, name) {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error does not name %q:\n%v", want, err)
			}
		}
	}
}
