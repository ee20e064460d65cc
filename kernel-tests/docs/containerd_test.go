package docs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/template"

	"github.com/pelletier/go-toml/v2"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/rootfs"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// Where containerd has what it makes of a file.
var (
	criV2      = []string{"plugins", "io.containerd.grpc.v1.cri", "containerd"}
	imagesV3   = []string{"plugins", "io.containerd.cri.v1.images"}
	runtimesV3 = []string{"plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes", "erofsd"}
	platforms  = []string{"plugins", "io.containerd.cri.v1.images", "runtime_platforms", "erofsd"}
)

// What containerd must make of each file. k3s's have its own first.
var snippets = []struct {
	name, base string
	two        bool // containerd 2 reads it, else 1
	table      []string
	want       map[string]any
}{
	{"config-v2.toml", "", false, criV2, map[string]any{"snapshotter": "erofsd", "disable_snapshot_annotations": false}},
	{"runtime-v2.toml", "", false, criV2, map[string]any{"snapshotter": "overlayfs", "disable_snapshot_annotations": false}},
	{"k3s-v2.toml.tmpl", k3sV2, false, append(slices.Clone(criV2), "runtimes", "erofsd"), map[string]any{"runtime_type": "io.containerd.runc.v2"}},
	{"config-v3.toml", "", true, imagesV3, map[string]any{"snapshotter": "erofsd", "disable_snapshot_annotations": false}},
	{"runtime-v3.toml", "", true, platforms, map[string]any{"snapshotter": "erofsd"}},
	{"runtime-v3.toml", "", true, runtimesV3, map[string]any{"snapshotter": "erofsd"}},
	{"runtime-v3.toml", "", true, imagesV3, map[string]any{"snapshotter": "overlayfs", "disable_snapshot_annotations": false}},
	{"k3s-v3.toml.tmpl", k3sV3, true, platforms, map[string]any{"snapshotter": "erofsd"}},
	{"k3s-v3.toml.tmpl", k3sV3, true, runtimesV3, map[string]any{"snapshotter": "erofsd"}},
}

// What k3s writes before what is added, as far as both speak of the same.
const (
	k3sV2 = `
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
disable_snapshot_annotations = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = true
`
	k3sV3 = `
version = 3
[plugins.'io.containerd.cri.v1.images']
snapshotter = "overlayfs"
disable_snapshot_annotations = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
SystemdCgroup = true
`
)

// TestContainerdFiles has containerd itself read the files of configs/containerd: it knows every
// key, and makes of them what they are for.
func TestContainerdFiles(t *testing.T) {
	services.Containerd(t) // is installed where it can be
	one := testenv.Tool(t, "containerd")
	built, err := filepath.Glob(filepath.Join(rootfs.CacheDir(), "containerd-v2*", "containerd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range snippets {
		t.Run(s.name+" "+s.table[len(s.table)-1], func(t *testing.T) {
			program := one
			if s.two {
				if len(built) == 0 {
					testenv.Need(t, "containerd 2", "needs containerd 2, which kernel-tests/containerd builds")
				}
				program = slices.Max(built)
			}
			dump := containerdDump(t, program, fill(t, s.name, s.base))
			if address := at(dump, "proxy_plugins", "erofsd")["address"]; address != "/run/containerd-erofsd/containerd-erofsd-grpc.sock" {
				t.Errorf("the snapshotter is at %v", address)
			}
			table := at(dump, s.table...)
			for k, want := range s.want {
				if table[k] != want {
					t.Errorf("%s is %v, want %v", k, table[k], want)
				}
			}
		})
	}
}

// fill is a file of configs/containerd behind base.
func fill(t *testing.T, name, base string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(testenv.ModuleRoot(t), "configs", "containerd", name))
	if err != nil {
		t.Fatal(err)
	}
	parsed := template.Must(template.New("").Parse(fmt.Sprintf("{{ define %q }}%s{{ end }}", "base", base)))
	var filled bytes.Buffer
	if err := template.Must(parsed.Parse(string(text))).Execute(&filled, struct{ SystemdCgroup bool }{true}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, filled.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// containerdDump is what containerd makes of a file.
func containerdDump(t *testing.T, program, file string) map[string]any {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, "--config", file, "config", "dump")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, said.String())
	}
	if text := said.String(); strings.Contains(text, "unknown") || strings.Contains(text, "level=error") {
		t.Errorf("containerd says: %s", text)
	}
	var dump map[string]any
	if err := toml.Unmarshal(out.Bytes(), &dump); err != nil {
		t.Fatal(err)
	}
	return dump
}

// at is a table of tables.
func at(tree map[string]any, path ...string) map[string]any {
	for _, name := range path {
		tree, _ = tree[name].(map[string]any)
	}
	return tree
}
