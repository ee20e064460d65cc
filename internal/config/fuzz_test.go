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

// seed adds the files of that name of every backend, and some more.
func seed(f *testing.F, form string, more ...string) {
	f.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "*", form))
	if err != nil || len(files) == 0 {
		f.Fatalf("no %s to begin with (%v)", form, err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, text := range more {
		f.Add([]byte(text))
	}
}

// secretsOf collects the values that must not be told, and whatever else the document
// says, which may be.
func secretsOf(n *node, key string, secrets, others *[]string) {
	secretKeys := []string{"auth", "registry_token", "token", "access_key_secret", "encryption_key", "login", "headers"}
	if n.kind == kindText {
		if slices.Contains(secretKeys, key) {
			*secrets = append(*secrets, n.text)
		} else {
			*others = append(*others, n.text)
		}
	}
	for _, e := range n.list {
		secretsOf(e, key, secrets, others)
	}
	for _, name := range n.names {
		*others = append(*others, name)
		under := name
		if key == "headers" {
			under = key
		}
		secretsOf(n.fields[name], under, secrets, others)
	}
}

// checkTold fails t when what is told repeats a secret of the document.
func checkTold(t *testing.T, root *node, warnings []string, err error) {
	t.Helper()
	told := strings.Join(warnings, "\n")
	if err != nil {
		told += err.Error()
	}
	var secrets, others []string
	secretsOf(root, "", &secrets, &others)
	for _, s := range secrets {
		elsewhere := slices.ContainsFunc(others, func(o string) bool { return strings.Contains(o, s) })
		if strings.Contains(s, "marker") && strings.Contains(told, s) && !elsewhere { // a short one could be a word of ours
			t.Errorf("the secret %q is told: %s", s, told)
		}
	}
}

// checkBroken fails t when the text about a document that does not parse repeats one of
// its values. Names of keys may be in it.
func checkBroken(t *testing.T, err error) {
	t.Helper()
	if err != nil && strings.Contains(err.Error(), "marker") && !strings.Contains(err.Error(), "key ") {
		t.Errorf("a value is told: %v", err)
	}
}

func FuzzParseNydus(f *testing.F) {
	seed(f, "v1.json", `{"version":2,"backend":{"type":7}}`, `{"device":{"backend":null}}`)
	seed(f, "v2.json")
	seed(f, "v2.toml", "version = 2\nbackend.registry.auth = marker-x", "a = [[{b = 1}, 2], {c.d = 3}]\n[[e.f]]\n[[e.f.g]]\n[e.f.g.h]\n")
	f.Fuzz(func(t *testing.T, data []byte) {
		i, warnings, err := ParseNydus(data)
		d := &decoder{}
		root, broken := d.document(data)
		if broken != nil {
			checkBroken(t, err)
			return
		}
		checkTold(t, root, warnings, err)
		if err == nil && (i.Backend.Type == "" || i.Backend.table() == nil) {
			t.Errorf("no backend and no error: %v", i)
		}
	})
}

func FuzzParseBlobEntry(f *testing.F) {
	seed(f, "entry.json", `{"type":"bootstrap","id":"i","config_v2":{"backend":{"type":"registry","registry":{"auth":"marker-x"}}}}`, `{"config":[]}`)
	f.Fuzz(func(t *testing.T, data []byte) {
		e, warnings, err := ParseBlobEntry(data)
		root, broken := parseJSON(data, &findings{})
		if broken != nil {
			checkBroken(t, err)
			return
		}
		checkTold(t, root, warnings, err)
		if err != nil {
			checkKind(t, err)
			return
		}
		state, err := e.MarshalState()
		if err != nil {
			t.Fatal(err)
		}
		back, warnings, err := ParseBlobEntry(state)
		if diff := cmp.Diff(e, back); err != nil || len(warnings) > 0 || diff != "" {
			t.Errorf("saved and read again: error %v, warnings %q, entry (-before +after):\n%s", err, warnings, diff)
		}
	})
}

// checkKind fails t unless err is one of those that the API knows.
func checkKind(t *testing.T, err error) {
	t.Helper()
	_, parse := errors.AsType[*ParseError](err)
	_, request := errors.AsType[*RequestError](err)
	_, invalid := errors.AsType[*InvalidError](err)
	if !parse && !request && !invalid {
		t.Errorf("error %T: %v", err, err)
	}
}

func FuzzParseDaemonFile(f *testing.F) {
	files, err := filepath.Glob(filepath.Join("testdata", "*", "entry.json"))
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add([]byte(`{"blobs":[` + string(data) + `,{"type":7}]}`))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, warnings, err := ParseDaemonFile(data)
		root, broken := parseJSON(data, &findings{})
		if broken != nil {
			checkBroken(t, err)
			return
		}
		checkTold(t, root, warnings, err)
		if err != nil {
			checkKind(t, err)
			if len(entries) > 0 {
				t.Error("entries and an error")
			}
		}
	})
}

func FuzzLoad(f *testing.F) {
	seed(f, "erofsd.toml", "[image.backend.registry]\nauth = \"marker-x\"\n", "auth = marker-x", "[[image.backend.registry.mirrors]]\nheaders = {A = 'marker-x'}")
	shipped, err := os.ReadFile(filepath.Join("..", "..", "configs", "erofsd.toml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(shipped)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := decodeOwn(data, "f.toml", func(string) (Secret, error) { return "user:file-marker", nil })
		root, broken := parseTOML(data)
		if broken != nil {
			checkBroken(t, err)
			return
		}
		checkTold(t, root, nil, err)
		if err != nil && strings.Contains(err.Error(), "file-marker") {
			t.Errorf("a secret of a file is told: %v", err)
		}
		if err == nil {
			if err := c.Validate(); err != nil {
				t.Errorf("accepted, but not valid: %v", err)
			}
		}
	})
}
