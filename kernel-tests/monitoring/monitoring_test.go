package monitoring

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.yaml.in/yaml/v3"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// metrics are those of both programs, each with its labels.
func metrics(t *testing.T) map[string][]string {
	t.Helper()
	known := map[string][]string{"up": nil} // Prometheus' own
	for _, name := range []string{"internal/daemon/testdata/metrics.txt", "cmd/containerd-erofsd-grpc/testdata/metrics.txt"} {
		text, err := os.ReadFile(filepath.Join(testenv.ModuleRoot(t), name))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			var name, kind, labels string
			if _, err := fmt.Sscan(line, &name, &kind, &labels); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			list := strings.Split(strings.Trim(labels, "{}"), ",")
			if kind != "histogram" {
				known[name] = list
				continue
			}
			known[name+"_bucket"] = append(list, "le")
			known[name+"_sum"], known[name+"_count"] = list, list
		}
	}
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		known[f.GetName()] = nil
	}
	return known
}

// A question is an expression, and where it is.
type question struct{ at, expr string }

// check has Prometheus read the questions, which must ask for what there is.
func check(t *testing.T, questions []question) {
	t.Helper()
	var in, out, said bytes.Buffer
	for _, q := range questions {
		if err := json.NewEncoder(&in).Encode(q.expr); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), services.Tool(t, "promexpr"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &said
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, said.String())
	}
	known := metrics(t)
	answers := json.NewDecoder(&out)
	for _, q := range questions {
		var asked []struct {
			Metric string   `json:"metric"`
			Labels []string `json:"labels"`
		}
		if err := answers.Decode(&asked); err != nil {
			t.Fatal(err)
		}
		if len(asked) == 0 {
			t.Errorf("%s asks for nothing: %s", q.at, q.expr)
		}
		for _, a := range asked {
			labels, ok := known[a.Metric]
			if !ok {
				t.Errorf("%s asks for %s, which nobody exports", q.at, a.Metric)
			}
			for _, l := range a.Labels {
				if l != "job" && l != "instance" && !slices.Contains(labels, l) {
					t.Errorf("%s: %s has no label %s", q.at, a.Metric, l)
				}
			}
		}
		for _, l := range grouped(q.expr) {
			has := slices.ContainsFunc(asked, func(s struct {
				Metric string   `json:"metric"`
				Labels []string `json:"labels"`
			},
			) bool {
				return slices.Contains(known[s.Metric], l)
			})
			if l != "job" && l != "instance" && !has {
				t.Errorf("%s: nothing has the label %s, by which it is grouped", q.at, l)
			}
		}
	}
}

// grouped are the labels that an expression groups by.
func grouped(expr string) (labels []string) {
	for _, by := range regexp.MustCompile(`\bby \(([^)]*)\)`).FindAllStringSubmatch(expr, -1) {
		for l := range strings.SplitSeq(by[1], ",") {
			labels = append(labels, strings.TrimSpace(l))
		}
	}
	return labels
}

func files(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(testenv.ModuleRoot(t), "configs", pattern))
	if err != nil || len(names) != 2 {
		t.Fatalf("%s: %q, %v", pattern, names, err)
	}
	return names
}

// A dashboard is what matters of Grafana's.
type dashboard struct {
	UID, Title, Description string
	Panels                  []struct {
		ID                       int
		Type, Title, Description string
		GridPos                  struct{ H, W, X, Y int }
		Targets                  []struct{ RefID, Expr string }
	}
}

// TestDashboards: each panel is somewhere of its own and explained, and asks for what there
// is.
func TestDashboards(t *testing.T) {
	var questions []question
	uids := map[string]bool{}
	for _, name := range files(t, "grafana/*.json") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if uids[d.UID] || d.UID == "" || d.Description == "" {
			t.Errorf("%s: uid %q, description %q", name, d.UID, d.Description)
		}
		uids[d.UID] = true
		ids, taken := map[int]bool{}, map[[2]int]string{}
		for _, p := range d.Panels {
			at := filepath.Base(name) + ": " + p.Title
			if ids[p.ID] || p.ID == 0 {
				t.Errorf("%s has the id %d of another", at, p.ID)
			}
			ids[p.ID] = true
			if p.Type != "row" && (p.Description == "" || len(p.Targets) == 0) {
				t.Errorf("%s is not explained, or asks for nothing", at)
			}
			for x := range p.GridPos.W {
				for y := range p.GridPos.H {
					place := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
					if other := taken[place]; other != "" || place[0] >= 24 {
						t.Fatalf("%s lies over %q, or outside", at, other)
					}
					taken[place] = p.Title
				}
			}
			for _, target := range p.Targets {
				questions = append(questions, question{at, strings.ReplaceAll(target.Expr, "$__rate_interval", "5m")})
			}
		}
	}
	if len(questions) < 60 {
		t.Errorf("only %d expressions were found", len(questions))
	}
	check(t, questions)
}

// A rule is an alert; nothing else is known.
type rule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

// TestAlerts: each alert has a name of its own, says what is wrong and what to do, and asks
// for what there is.
func TestAlerts(t *testing.T) {
	var questions []question
	names := map[string]bool{}
	for _, name := range files(t, "prometheus/*.yml") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var all struct {
			Groups []struct {
				Name  string `yaml:"name"`
				Rules []rule `yaml:"rules"`
			} `yaml:"groups"`
		}
		d := yaml.NewDecoder(bytes.NewReader(text))
		d.KnownFields(true)
		if err := d.Decode(&all); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := d.Decode(&all); !errors.Is(err, io.EOF) {
			t.Errorf("%s has more: %v", name, err)
		}
		for _, g := range all.Groups {
			for _, r := range g.Rules {
				if names[r.Alert] || r.Alert == "" {
					t.Errorf("%s: the name %q is another's", name, r.Alert)
				}
				names[r.Alert] = true
				if _, err := time.ParseDuration(r.For); r.For != "" && err != nil {
					t.Errorf("%s: for: %v", r.Alert, err)
				}
				if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) || len(r.Labels) != 1 {
					t.Errorf("%s: labels %v", r.Alert, r.Labels)
				}
				for _, key := range []string{"summary", "description", "action"} {
					if r.Annotations[key] == "" {
						t.Errorf("%s has no %s", r.Alert, key)
					}
				}
				questions = append(questions, question{r.Alert, r.Expr})
				check := regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(fmt.Sprint(r.Annotations), -1)
				for _, label := range check {
					if by := grouped(r.Expr); len(by) > 0 && !slices.Contains(by, label[1]) {
						t.Errorf("%s speaks of the label %s, which its expression drops", r.Alert, label[1])
					}
				}
			}
		}
	}
	for _, want := range []string{
		"ErofsdDown", "ErofsdReadsFail", "ErofsdCorruptData", "ErofsdFillsSlow", "ErofsdCacheFull", "ErofsdBackendErrors",
		"ErofsdSnapshotterDown", "ErofsdSnapshotterWithoutDaemon",
	} {
		if !names[want] {
			t.Errorf("there is no %s", want)
		}
	}
	check(t, questions)
}
