package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"

	"github.com/erofsd/erofsd/internal/testenv"
)

var updateMetrics = flag.Bool("update", false, "write testdata/metrics.txt anew")

// TestMetricNames: testdata/metrics.txt, which the dashboard and the alerts are checked
// against, has every metric of the snapshotter, and docs/metrics.md says something of each.
func TestMetricNames(t *testing.T) {
	node, m := newNode(), newMetrics()
	m.registry.MustRegister(reader{images: node, daemon: node})
	m.event("RUNNING")
	measured{m: m}.done("PREPARE", time.Now(), fmt.Errorf("an error"))
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	names := map[string]bool{}
	for _, f := range families {
		if name := f.GetName(); !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			names[name] = true
			lines = append(lines, describe(f))
		}
	}
	slices.Sort(lines)
	got := strings.Join(lines, "\n") + "\n"
	if *updateMetrics {
		if err := os.WriteFile("testdata/metrics.txt", []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("metrics are not as in testdata/metrics.txt (-want +got):\n%s", diff)
	}
	docs, err := os.ReadFile(filepath.Join(testenv.ModuleRoot(t), "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	for name := range names {
		if !strings.Contains(string(docs), "`"+name+"`") {
			t.Errorf("docs/metrics.md says nothing of %s", name)
		}
	}
	if len(names) < 12 {
		t.Errorf("only %d metrics", len(names))
	}
}

// describe is a line of the golden file: name, type, labels, help.
func describe(f *dto.MetricFamily) string {
	var labels []string
	for _, l := range f.GetMetric()[0].GetLabel() {
		labels = append(labels, l.GetName())
	}
	return fmt.Sprintf("%s %s {%s} %s", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ","), f.GetHelp())
}
