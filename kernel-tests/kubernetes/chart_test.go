package kubernetes

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/erofsd/erofsd/internal/config"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

var update = flag.Bool("update", false, "write configs/kubernetes/erofsd.yaml anew")

func TestMain(m *testing.M) { testenv.Main(m) }

// A chart is configs/helm/erofsd with what reads it.
type chart struct {
	t                      *testing.T
	dir                    string
	helm, kubetypes, check string
	env                    []string
}

func newChart(t *testing.T) *chart {
	t.Helper()
	home := t.TempDir()
	c := &chart{
		t: t, dir: filepath.Join(testenv.ModuleRoot(t), "configs", "helm", "erofsd"), helm: services.Helm(t), kubetypes: services.Tool(t, "kubetypes"),
		check: filepath.Join(home, "containerd-erofsd-grpc"),
		env:   append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home),
	}
	build := exec.CommandContext(t.Context(), testenv.Tool(t, "go"), "build", "-o", home+"/", "./cmd/containerd-erofsd-grpc")
	build.Dir, build.Env = testenv.ModuleRoot(t), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return c
}

// TestChart is all that needs helm.
func TestChart(t *testing.T) {
	c := newChart(t)
	for name, test := range map[string]func(*testing.T, *chart){
		"plain": testPlain, "lint": testLint, "values": testValues, "wrong values": testWrongValues,
	} {
		t.Run(name, func(t *testing.T) { test(t, c.in(t)) })
	}
}

// in is c for a test.
func (c *chart) in(t *testing.T) *chart {
	d := *c
	d.t = t
	return &d
}

// run runs helm, or returns what it says.
func (c *chart) run(args ...string) (string, error) {
	cmd := exec.CommandContext(c.t.Context(), c.helm, append(args, "--kube-version=1.33.0")...)
	cmd.Env = c.env
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("helm %s: %w: %s%s", args[0], err, out.String(), said.String())
	}
	return out.String(), nil
}

// render renders the chart with values.
func (c *chart) render(values string) (string, error) {
	c.t.Helper()
	file := filepath.Join(c.t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return c.run("template", "erofsd", c.dir, "--namespace=erofsd", "--values="+file)
}

// objects are what Kubernetes' own types make of manifests: kind, namespace, name.
func (c *chart) objects(manifests string) []string {
	c.t.Helper()
	cmd := exec.CommandContext(c.t.Context(), c.kubetypes)
	cmd.Stdin = strings.NewReader(manifests)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("%v: %s", err, out)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// header is what the plain file has beside the rendered chart: helm makes the namespace itself.
const header = `# erofsd on the nodes of a cluster, without helm: kubectl apply -f erofsd.yaml
# It is the chart configs/helm/erofsd with its defaults; put your image in it first.
apiVersion: v1
kind: Namespace
metadata:
  name: erofsd
  labels:
    # The pods are root on their nodes.
    pod-security.kubernetes.io/enforce: privileged
`

// testPlain: configs/kubernetes/erofsd.yaml is the chart with its defaults, and all of it is
// what Kubernetes knows.
func testPlain(t *testing.T, c *chart) {
	rendered, err := c.render("{}")
	if err != nil {
		t.Fatal(err)
	}
	text := header + rendered
	file := filepath.Join(c.dir, "..", "..", "kubernetes", "erofsd.yaml")
	if *update {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(text, string(have)); diff != "" {
		t.Errorf("the plain file is not the chart with its defaults (go test ./kernel-tests/kubernetes -update; -want +got):\n%s", diff)
	}
	want := []string{"Namespace  erofsd", "ServiceAccount erofsd erofsd", "ConfigMap erofsd erofsd", "DaemonSet erofsd erofsd"}
	if diff := cmp.Diff(want, c.objects(string(have))); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
}

// testLint: helm has nothing to say against the chart, but that it has no icon.
func testLint(t *testing.T, c *chart) {
	out, err := c.run("lint", "--strict", c.dir)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "[") && !strings.Contains(line, "icon is recommended") {
			t.Error(line)
		}
	}
	if !strings.Contains(out, "1 chart(s) linted, 0 chart(s) failed") {
		t.Error(out)
	}
}

// Values that are right, and the objects that they add or change.
var rightValues = []struct {
	name, values string
	objects      []string // besides those of the defaults
	words        []string // that the result has
}{
	{
		"secrets of namespaces", "credentials: {providers: [secrets], secrets: {namespaces: [a, b]}}",
		[]string{"Role a erofsd-secrets", "RoleBinding a erofsd-secrets", "Role b erofsd-secrets", "RoleBinding b erofsd-secrets"},
		[]string{"--account=/var/run/secrets/kubernetes.io/serviceaccount", "automountServiceAccountToken: true"},
	},
	{
		"all secrets", "credentials: {providers: [docker, secrets], secrets: {namespaces: ['*']}}",
		[]string{"ClusterRole  erofsd-secrets", "ClusterRoleBinding  erofsd-secrets"},
		nil,
	},
	{"removal", "{action: remove, credentials: {providers: [docker]}}", nil, []string{"- remove\n"}},
	{"runtime", "runtimeClass: {create: true, name: lazy}", []string{"RuntimeClass  lazy"}, []string{"handler: erofsd"}},
	{
		"everything", `
image: {repository: registry.example:5000/team/erofsd, tag: v1, pullPolicy: Always}
imagePullSecrets: [{name: regcred}]
host: {bin: /opt/erofsd/bin}
containerd: {dropIn: /etc/containerd/conf.d/erofsd.toml, restart: true}
daemon: {config: "[daemon]\nroot = \"/data/erofsd\"\n[cache]\nhigh = \"20GiB\"\n"}
snapshotter: {config: "[backend]\nhosts_dir = \"/etc/containerd/certs.d\"\n[[backends]]\nimages = [\"*.example/team\"]\nplain_http = [\"a:1\"]\n"}
credentials: {providers: [kubelet], renew: 1m, kubelet: {config: /etc/kubernetes/credentials.yaml, plugins: /usr/libexec/credentials}}
metrics: {daemonPort: 9464, snapshotterPort: 9110}
serviceAccount: {name: account, annotations: {a: b}}
podLabels: {team: x}
podAnnotations: {note: here}
nodeSelector: {lazy: "true"}
affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: k, operator: Exists}]}]}}}
tolerations: []
maxUnavailable: 10%
resources: {limits: {cpu: 1}}
`,
		[]string{"ServiceAccount erofsd account"},
		[]string{"--containerd-drop-in=/etc/containerd/conf.d/erofsd.toml", "--restart-containerd", "--bin=/opt/erofsd/bin", "registry.example:5000/team/erofsd:v1", `address = ":9464"`, `address = ":9110"`},
	},
}

// testValues: whatever the values are, Kubernetes knows what comes of them, and the programs
// take their configuration.
func testValues(t *testing.T, c *chart) {
	for _, test := range rightValues {
		t.Run(test.name, func(t *testing.T) {
			c := c.in(t)
			rendered, err := c.render(test.values)
			if err != nil {
				t.Fatal(err)
			}
			objects := c.objects(rendered)
			for _, o := range test.objects {
				if !slices.Contains(objects, o) {
					t.Errorf("no %s in %q", o, objects)
				}
			}
			if len(test.objects) == 0 && len(objects) != 3 {
				t.Errorf("objects: %q", objects)
			}
			for _, w := range test.words {
				if !strings.Contains(rendered, w) {
					t.Errorf("no %q in\n%s", w, rendered)
				}
			}
			c.checkConfiguration(rendered)
		})
	}
}

// checkConfiguration has the programs read what the ConfigMap has.
func (c *chart) checkConfiguration(rendered string) {
	c.t.Helper()
	var found int
	for d := yaml.NewDecoder(strings.NewReader(rendered)); ; {
		var object struct {
			Kind string            `yaml:"kind"`
			Data map[string]string `yaml:"data"`
		}
		if d.Decode(&object) != nil {
			break
		}
		if object.Kind != "ConfigMap" {
			continue
		}
		found++
		for name, text := range object.Data {
			file := filepath.Join(c.t.TempDir(), name)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				c.t.Fatal(err)
			}
			if name == "containerd-erofsd.toml" {
				if out, err := exec.Command(c.check, "--config", file, "--check").CombinedOutput(); err != nil || len(out) > 0 {
					c.t.Errorf("%v: %s in\n%s", err, out, text)
				}
			} else if _, err := config.Load(file); err != nil {
				c.t.Errorf("%v in\n%s", err, text)
			}
		}
	}
	if found != 1 {
		c.t.Errorf("%d ConfigMaps", found)
	}
}

// testWrongValues: a value that is not known, or cannot work, is refused before anything is
// done.
func testWrongValues(t *testing.T, c *chart) {
	for values, want := range map[string]string{
		"imag: {}":                                          "imag",
		"image: {tags: v1}":                                 "tags",
		"action: uninstall":                                 "action",
		"host: {bin: usr/bin}":                              "bin",
		"credentials: {providers: [vault]}":                 "providers",
		"credentials: {providers: [secrets]}":               "credentials.secrets.namespaces",
		"credentials: {providers: [kubelet]}":               "credentials.kubelet.config",
		"metrics: {daemonPort: 70000}":                      "daemonPort",
		"containerd: {dropIn: conf.d/x.toml}":               "dropIn",
		"credentials: {renew: often}":                       "renew",
		"credentials: {secrets: {namespaces: ['A']}}":       "namespaces",
		"snapshotter: {config: {backend: {}}}":              "config",
		"maxUnavailable: 0":                                 "maxUnavailable",
		"runtimeClass: {create: maybe}":                     "create",
		"terminationGracePeriodSeconds: -1":                 "terminationGracePeriodSeconds",
		"imagePullSecrets: [regcred]":                       "imagePullSecrets",
		"{podLabels: {a: {b: c}}}":                          "podLabels",
		"{tolerations: {operator: Exists}}":                 "tolerations",
		"{serviceAccount: {create: true}}":                  "create",
		"{priorityClassName: 7}":                            "priorityClassName",
		"{resources: {limit: {cpu: 1}}}":                    "limit",
		"{image: {repository: ''}}":                         "repository",
		"{containerd: {restart: 'yes'}}":                    "restart",
		"{nodeSelector: [a]}":                               "nodeSelector",
		"{credentials: {providers: [docker, docker]}}":      "providers",
		"{credentials: {kubelet: {plugins: relative/dir}}}": "plugins",
	} {
		if _, err := c.render(values); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", values, err)
		}
	}
}

// TestDocumented: each value has a comment of its own, and the schema knows it and nothing
// else.
func TestDocumented(t *testing.T) {
	dir := filepath.Join(testenv.ModuleRoot(t), "configs", "helm", "erofsd")
	text, err := os.ReadFile(filepath.Join(dir, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	key := regexp.MustCompile(`^ *[A-Za-z]+:`)
	last := ""
	for line := range strings.Lines(string(text)) {
		if key.MatchString(line) && !strings.HasPrefix(strings.TrimSpace(last), "#") && !inside(line, "requests", "limits", "cpu", "memory", "root", "kubernetes") {
			t.Errorf("values.yaml says nothing of %s", strings.TrimSpace(line))
		}
		last = line
	}
	var values map[string]any
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	schema, err := os.ReadFile(filepath.Join(dir, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var s object
	if err := json.Unmarshal(schema, &s); err != nil {
		t.Fatal(err)
	}
	delete(s.Properties, "global") // helm's own
	s.compare(t, "", values)
}

// inside reports whether a line of values.yaml is a part of a value that is explained above.
func inside(line string, keys ...string) bool {
	return slices.ContainsFunc(keys, func(k string) bool { return strings.HasPrefix(strings.TrimSpace(line), k) })
}

// An object of a JSON schema.
type object struct {
	Properties map[string]object `json:"properties"`
}

func (o object) compare(t *testing.T, at string, values map[string]any) {
	t.Helper()
	for _, k := range slices.Sorted(maps.Keys(o.Properties)) {
		v, ok := values[k]
		if !ok && at != ".resources" {
			t.Errorf("values.yaml has no %s.%s", at, k)
		}
		if m, isMap := v.(map[string]any); isMap && len(o.Properties[k].Properties) > 0 {
			o.Properties[k].compare(t, at+"."+k, m)
		}
	}
	for k := range values {
		if _, ok := o.Properties[k]; !ok {
			t.Errorf("the schema has no %s.%s", at, k)
		}
	}
}
