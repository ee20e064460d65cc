package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/fanotify/fanotifytest"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A listMounter mounts nothing but in its list.
type listMounter struct {
	mu   sync.Mutex // guards what follows
	list []Mounted
}

func (l *listMounter) Mount(_ context.Context, s MountSpec) error {
	point, err := os.Readlink(fmt.Sprint("/proc/self/fd/", s.Target.Fd()))
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	m := Mounted{Point: point, Minor: len(l.list)}
	if s.Clone != nil {
		m.Source = s.Clone.Source
	} else {
		m.Source = s.Bootstrap.Name()
	}
	l.list = append(l.list, m)
	return nil
}

func (l *listMounter) Unmount(_ context.Context, point string, _ bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = slices.DeleteFunc(l.list, func(m Mounted) bool { return m.Point == point })
	return nil
}

func (l *listMounter) Mounted() ([]Mounted, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.list), nil
}

// fakeDaemon is a daemon on a fake kernel that is served until the test ends.
func fakeDaemon(t testing.TB, o Options) (*Daemon, *fanotifytest.Kernel) {
	t.Helper()
	k, f := fanotifytest.New(t)
	g, err := fanotify.NewFakeGroup(f, k.Mark, fanotify.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o.Root, o.Kernel = newRoot(t), FakeKernel{Group: g, Mounter: &listMounter{}}
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context())
	if err := d.begin(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		if err := d.end(ctx, ctx); err != nil {
			t.Error(err)
		}
	})
	return d, k
}

// gather returns what g has, by name.
func gather(t testing.TB, g prometheus.Gatherer) map[string]*dto.MetricFamily {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*dto.MetricFamily{}
	for _, f := range families {
		out[f.GetName()] = f
	}
	return out
}

// value returns the one value of a metric.
func value(t testing.TB, all map[string]*dto.MetricFamily, name string) float64 {
	t.Helper()
	f := all[name]
	if len(f.GetMetric()) != 1 {
		t.Fatalf("%s has %d values", name, len(f.GetMetric()))
	}
	m := f.GetMetric()[0]
	return m.GetGauge().GetValue() + m.GetCounter().GetValue()
}

// TestMetrics: after a run every metric of testdata/metrics.txt is there, with its type,
// labels and help, and no other; all are named as Prometheus wants it.
func TestMetrics(t *testing.T) {
	d, k := fakeDaemon(t, Options{NoCompletion: true, High: 1 << 30})
	r := localRequest(t, "zstd")
	r.Mountpoint = t.TempDir()
	if _, err := d.Mount(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	for v := range d.deviceSet() {
		if a := k.Raise(v.blob.File(), 0, 4096).Answer(t); a != fanotifytest.Allow {
			t.Fatalf("a read is answered with %v", a)
		}
	}
	d.measured.fanotify(fanotify.OpFill, time.Millisecond, nil) // the fake kernel has no observer
	d.measured.cachefiles(cachefiles.OpRead, time.Millisecond, errors.New("no"))

	all := gather(t, d.metrics)
	var families []*dto.MetricFamily
	var lines []string
	for name, f := range all {
		if !strings.HasPrefix(name, "erofsd_") {
			continue
		}
		families = append(families, f)
		lines = append(lines, describeFamily(f))
	}
	for _, name := range []string{"go_goroutines", "process_open_fds", "process_resident_memory_bytes", "process_cpu_seconds_total"} {
		if all[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
	slices.Sort(lines)
	want, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(string(want), strings.Join(lines, "\n")+"\n"); diff != "" {
		t.Errorf("metrics are not as in testdata/metrics.txt, docs/metrics.md, configs/prometheus and configs/grafana (-want +got):\n%s", diff)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// metricName matches our metrics, and those of the process that our texts speak of.
var metricName = regexp.MustCompile(`\b(?:erofsd_[a-z_]+|process_[a-z_]+|go_goroutines)\b`)

// TestMetricTexts: the dashboard, the alerts and the documentation speak of metrics that
// there are, the documentation of every one.
func TestMetricTexts(t *testing.T) {
	golden, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	known, documented := map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(string(golden)) {
		fields := strings.Fields(line)
		known[fields[0]] = true
		documented[fields[0]] = false
		if fields[1] == "histogram" {
			for _, suffix := range []string{"_bucket", "_count", "_sum"} {
				known[fields[0]+suffix] = true
			}
		}
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for name := range gather(t, reg) {
		known[name] = true
	}
	root := testenv.ModuleRoot(t)
	const docs = "docs/metrics.md"
	for _, file := range []string{"configs/grafana/erofsd.json", "configs/prometheus/erofsd.rules.yml", docs} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Error(err)
			continue
		}
		if filepath.Ext(file) == ".json" && !json.Valid(text) {
			t.Errorf("%s is not JSON", file)
		}
		names := metricName.FindAllString(string(text), -1)
		if len(names) < 10 {
			t.Errorf("%s speaks of %d metrics only", file, len(names))
		}
		for _, name := range names {
			if strings.HasPrefix(name, "erofsd_snapshotter_") { // containerd-erofsd-grpc's, whose tests know them
				continue
			}
			if !known[name] {
				t.Errorf("%s speaks of %s, which is no metric", file, name)
			}
			if file == docs {
				documented[name] = true
			}
		}
	}
	for name, ok := range documented {
		if !ok {
			t.Errorf("%s says nothing of %s", docs, name)
		}
	}
}

// describeFamily is a line of the golden file: name, type, labels, help.
func describeFamily(f *dto.MetricFamily) string {
	var labels []string
	for _, l := range f.GetMetric()[0].GetLabel() {
		labels = append(labels, l.GetName())
	}
	return fmt.Sprintf("%s %s {%s} %s", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ","), f.GetHelp())
}

// TestMetricValues follows an image from its mount to its unmount.
func TestMetricValues(t *testing.T) {
	d, k := fakeDaemon(t, Options{NoCompletion: true, High: 1 << 30, Low: 1 << 20})
	check := func(step string, want map[string]float64) {
		t.Helper()
		d.measured.mu.Lock()
		d.measured.expires = time.Time{}
		d.measured.mu.Unlock()
		all := gather(t, d.metrics)
		for name, v := range want {
			if got := value(t, all, "erofsd_"+name); got != v {
				t.Errorf("%s: %s is %v, want %v", step, name, got, v)
			}
		}
	}
	check("idle", map[string]float64{
		"kernel_served": 1, "build_info": 1, "mounts": 0, "open_images": 0, "cache_images": 0, "cache_bytes": 0,
		"cache_high_bytes": 1 << 30, "cache_low_bytes": 1 << 20, "kernel_requests_total": 0,
	})
	r := localRequest(t, "zstd")
	var points []string
	for range 2 {
		r.Mountpoint = t.TempDir()
		points = append(points, r.Mountpoint)
		if _, err := d.Mount(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	check("mounted twice", map[string]float64{
		"mounts": 2, "mounted_images": 1, "open_images": 1, "detached_images": 0, "complete_images": 0, "open_image_blobs": 1,
		"complete_image_blobs": 0, "image_present_bytes": 0, "bound_images": 0, "cache_images": 1,
	})
	for v := range d.deviceSet() {
		k.Raise(v.blob.File(), 0, v.blob.Stats().Size).Answer(t)
		<-v.blob.Done()
	}
	check("read", map[string]float64{
		"kernel_requests_total": 1, "kernel_denied_requests_total": 0, "complete_images": 1, "complete_image_blobs": 1,
		"kernel_requests_in_flight": 0, "fill_errors_total": 0,
	})
	if all := gather(t, d.metrics); value(t, all, "erofsd_image_present_bytes") != value(t, all, "erofsd_image_needed_bytes") || value(t, all, "erofsd_cache_bytes") == 0 {
		t.Error("a complete image has less than it needs, or takes nothing")
	}
	for _, p := range points {
		if err := d.Unmount(t.Context(), api.UnmountRequest{Mountpoint: p}); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the image to be closed", func() bool { return value(t, gather(t, d.metrics), "erofsd_open_images") == 0 })
	check("unmounted", map[string]float64{"mounts": 0, "mounted_images": 0, "open_image_blobs": 0, "cache_images": 1})
}

// deviceSet returns the open blobs.
func (d *Daemon) deviceSet() map[*device]bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := map[*device]bool{}
	for _, v := range d.devices {
		out[v] = true
	}
	return out
}

// TestCacheUsageOnce: scrapes do not each look at all records.
func TestCacheUsageOnce(t *testing.T) {
	d, _ := fakeDaemon(t, Options{NoCompletion: true})
	m := d.measured
	if u := m.cacheUsage(); !u.known || u.images != 0 {
		t.Fatalf("an empty cache is %+v", u)
	}
	r := localRequest(t, "zstd")
	r.Mountpoint = t.TempDir()
	if _, err := d.Mount(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if u := m.cacheUsage(); u.images != 0 {
		t.Errorf("it looked again at once: %+v", u)
	}
	m.expires = time.Now()
	if u := m.cacheUsage(); u.images != 1 {
		t.Errorf("it did not look again: %+v", u)
	}
}
