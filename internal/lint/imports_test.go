package lint

import (
	"encoding/json"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

const module = "github.com/erofsd/erofsd"

// ours is the whole import graph of the product: each package, and all of our
// packages that its code (not its tests) may import.
var ours = map[string][]string{
	"internal/kernel":  {},
	everywhere:         {},
	"internal/config":  {},
	"internal/logging": {},
	"internal/chunk":   {"internal/kernel"},
	"internal/api":     {},
	"internal/sandbox": {},
	"internal/fdstore": {},
	"internal/keeper":  {}, // it outlives everything else and must not grow with it
	"backend":          {"internal/kernel"},
	"cachefiles":       {"internal/kernel"},
	"fanotify":         {"internal/kernel"},
	"erofs":            {"internal/kernel"},

	"backend/httpproxy": {"backend", "backend/object"},
	"backend/localfs":   {"backend"},
	"backend/registry":  {"backend"},
	"backend/localdisk": {"backend"},
	"backend/object":    {"backend"},
	"backend/s3":        {"backend", "backend/object"},
	"backend/oss":       {"backend", "backend/object"},
	"blobmgr":           {"backend", "internal/chunk", "internal/kernel"},
	"convert":           {"erofs", "internal/chunk", "internal/kernel"},

	"internal/api/nydus": {},
	"internal/nydusd":    {"erofs", "internal/api", "internal/api/nydus"},
	"configs":            {}, // files that erofsctl node installs

	"internal/keychain": {"backend/registry"}, // docker's configuration and helpers

	"internal/boltcheck": {},
	"snapshotter":        {"internal/api", "internal/boltcheck"},

	"internal/daemon": {
		"backend", "backend/httpproxy", "backend/localdisk", "backend/localfs", "backend/registry", "backend/s3", "backend/oss", "blobmgr",
		"cachefiles", "erofs", "fanotify", "internal/api", "internal/api/nydus", "internal/chunk", "internal/config", "internal/keeper", "internal/kernel", "internal/sandbox",
	},

	"cmd/containerd-erofsd-grpc": {"snapshotter", "internal/api", "internal/erofsd", "internal/fdstore", "internal/keychain", "internal/logging", "internal/nydusd"},

	"internal/erofsd": {"internal/daemon", "internal/config", "internal/keeper", "internal/logging"},

	"cmd/erofsd":   {"internal/erofsd"},
	"cmd/erofsctl": {"backend", "backend/localfs", "backend/registry", "configs", "convert", "erofs", "fanotify", "cachefiles", "internal/api", "internal/chunk", "internal/daemon", "internal/kernel", "internal/sandbox"},
}

// everywhere may be imported by any package of ours: it does nothing in a release
// build.
const everywhere = "internal/failpoint"

// testOnly are the packages that only tests, each other and kernel-tests may import.
var testOnly = []string{"backend/backendtest", "fanotify/fanotifytest", "cachefiles/cachefilestest", "internal/api/nydus/nydustest", "internal/testenv", "internal/lint", "kernel-tests/"}

// confined lists modules and packages that only some files may import. A place is a
// folder, with all below it, or a file's path; * stands for any one name.
var confined = []struct {
	imports string
	places  []string
}{
	{"golang.org/x/sys/unix", []string{
		"cachefiles", "fanotify", "internal/fdstore", "internal/keeper", "internal/kernel", "internal/sandbox", "internal/testenv", "kernel-tests", "erofs/mount.go",
		"blobmgr/cachefile_linux.go", "internal/daemon", // processes and leases; a person reads it as a whole
		"cmd/containerd-erofsd-grpc/process.go", // pidfd
	}},
	{"github.com/prometheus", []string{
		"*/metrics.go", "cmd", "internal/daemon",
		"blobmgr/manager.go", // Options.Registerer
	}},
	{"oras.land", []string{"backend/registry", "cmd/erofsctl"}},
	{"github.com/urfave/cli", []string{"cmd"}},
	{"github.com/containerd", []string{"snapshotter", "cmd/containerd-erofsd-grpc", "kernel-tests"}},
	{"google.golang.org/grpc", []string{
		"snapshotter", "cmd/containerd-erofsd-grpc",
		"internal/keychain/cri.go", // the proxy of the CRI image service
	}},
	{"go.yaml.in/yaml", []string{"internal/keychain"}}, // the kubelet's and kubectl's files
	{"github.com/aws", []string{"backend/s3"}},
	{"github.com/aliyun", []string{"backend/oss"}},
	{module + "/internal/config", []string{"cmd", "internal/daemon", "internal/erofsd"}},
}

// neverLinked must not be in a binary, not even by way of something else.
var neverLinked = []string{
	"testing", "net/http/httptest", "github.com/google/go-containerregistry", "github.com/google/go-cmp",
	module + "/internal/testenv", module + "/backend/backendtest",
}

// goPackage is what go list tells of a package.
type goPackage struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Deps       []string
	Error      *struct{ Err string }
}

// packages lists the packages of the module and says the folder of each in it.
func packages(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,GoFiles,Deps,Error", "./...")
	cmd.Dir = testenv.ModuleRoot(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	found := make(map[string]goPackage)
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := dec.Decode(&p)
		if err == io.EOF {
			return found
		}
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		if p.Error != nil {
			t.Errorf("%s: %s", p.ImportPath, p.Error.Err)
		}
		found[strings.TrimPrefix(p.ImportPath, module+"/")] = p
	}
}

func TestImports(t *testing.T) {
	all := packages(t)
	for folder, p := range all {
		for _, name := range p.GoFiles {
			for _, imported := range importsOf(t, filepath.Join(p.Dir, name)) {
				if why := forbidden(folder, name, imported); why != "" {
					t.Errorf("%s/%s imports %s: %s", folder, name, imported, why)
				}
			}
		}
	}
	if len(all) < 10 {
		t.Errorf("go list found only %d packages: these rules would hold for nothing", len(all))
	}
}

func TestLinked(t *testing.T) {
	for folder, p := range packages(t) {
		if !strings.HasPrefix(folder, "cmd/") {
			continue
		}
		for _, dep := range p.Deps {
			if slices.ContainsFunc(neverLinked, func(n string) bool { return below(dep, n) }) {
				t.Errorf("%s links %s, which is for tests", folder, dep)
			}
		}
	}
}

// forbidden says why the file name of the package in folder must not import the
// given package, or nothing.
func forbidden(folder, name, imported string) string {
	for _, c := range confined {
		if below(imported, c.imports) && !allowed(folder, name, c.places) {
			return "only " + strings.Join(c.places, ", ") + " may"
		}
	}
	imported, isOurs := strings.CutPrefix(imported, module+"/")
	if !isOurs || isTestOnly(folder) {
		return ""
	}
	if isTestOnly(imported) {
		return "it is for tests"
	}
	if imported == everywhere {
		return ""
	}
	list, known := ours[folder]
	if !known {
		return "the table in internal/lint does not know " + folder + ": say there what it may import"
	}
	if !slices.Contains(list, imported) {
		return fmt.Sprintf("%s may import only %q of ours", folder, list)
	}
	return ""
}

func isTestOnly(folder string) bool {
	return slices.ContainsFunc(testOnly, func(p string) bool { return strings.HasPrefix(folder+"/", strings.TrimSuffix(p, "/")+"/") })
}

// allowed reports whether the file folder/name is at one of the places.
func allowed(folder, name string, places []string) bool {
	file := path.Join(folder, name)
	return slices.ContainsFunc(places, func(place string) bool {
		match, _ := path.Match(place, path.Join(path.Base(folder), name))
		return match || below(file, place)
	})
}

// below reports whether p is parent or lies below it.
func below(p, parent string) bool { return p == parent || strings.HasPrefix(p, parent+"/") }

func importsOf(t *testing.T, file string) []string {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, spec := range parsed.Imports {
		name, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, name)
	}
	return list
}

// TestRules tries the rules themselves: a table nobody can break checks nothing.
func TestRules(t *testing.T) {
	for _, c := range []struct {
		folder, file, imported string
		ok                     bool
	}{
		{"blobmgr", "fill.go", module + "/backend", true},
		{"blobmgr", "fill.go", module + "/backend/registry", false},
		{"blobmgr", "fill.go", module + "/fanotify", false},
		{"blobmgr", "fill.go", "golang.org/x/sys/unix", false},
		{"blobmgr", "cachefile_linux.go", "golang.org/x/sys/unix", true},
		{"fanotify", "server.go", module + "/blobmgr", false},
		{"backend", "metrics.go", "github.com/prometheus/client_golang/prometheus", true},
		{"backend", "retry.go", "github.com/prometheus/client_golang/prometheus", false},
		{"convert", "layer.go", "oras.land/oras-go/v2/registry", false},
		{"convert", "layer.go", module + "/internal/testenv", false},
		{"kernel-tests/bench", "main.go", module + "/internal/api", true},
		{"fanotify", "server.go", module + "/internal/failpoint", true},
		{"internal/failpoint", "on.go", module + "/internal/kernel", false},
		{"internal/failpoint", "on.go", "golang.org/x/sys/unix", false},
		{"internal/keeper", "worker.go", "golang.org/x/sys/unix", true},
		{"internal/keeper", "worker.go", module + "/internal/kernel", false},
		{"somewhere", "new.go", module + "/erofs", false},
		{"erofs", "check.go", "slices", true},
	} {
		if why := forbidden(c.folder, c.file, c.imported); (why == "") != c.ok {
			t.Errorf("%s/%s importing %s: got %q, want allowed %v", c.folder, c.file, c.imported, why, c.ok)
		}
	}
}
