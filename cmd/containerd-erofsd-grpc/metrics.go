package main

import (
	"context"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/erofsd/erofsd/internal/api"
)

// metrics are told in Prometheus's form: by nydus-snapshotter's names where they mean the
// same, else by ours. No label has the name of an image or a snapshot.
type metrics struct {
	registry   *prometheus.Registry
	operations *prometheus.HistogramVec
	failures   *prometheus.CounterVec
	events     *prometheus.CounterVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "snapshotter_snapshot_operation_elapsed_milliseconds",
			Help:    "Time of containerd's calls.",
			Buckets: []float64{0.5, 1, 5, 10, 50, 100, 150, 200, 250, 300, 350, 400, 600, 1000, 5000, 30000},
		}, []string{"snapshot_operation"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "erofsd_snapshotter_operation_errors_total", Help: "Of containerd's calls, those that failed; what it asks for to see whether it is there does not count.",
		}, []string{"snapshot_operation"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nydusd_lifetime_event_counts", Help: "How often erofsd was found running, and its end was seen.",
		}, []string{"nydusd_event"}),
	}
	m.registry.MustRegister(m.operations, m.failures, m.events, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// event counts one of the daemon's life.
func (m *metrics) event(name string) { m.events.WithLabelValues(name).Inc() }

// handler serves them, at nydus-snapshotter's path and the usual one.
func (m *metrics) handler() http.Handler {
	h := promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 2, Timeout: 2 * readingTime})
	mux := http.NewServeMux()
	mux.Handle("GET /v1/metrics", h)
	mux.Handle("GET /metrics", h)
	return mux
}

// measured is the snapshotter with its calls measured.
type measured struct {
	snapshots.Snapshotter
	cleaner snapshots.Cleaner
	m       *metrics
}

// done counts a call that began at a time.
func (s measured) done(operation string, began time.Time, err error) {
	s.m.operations.WithLabelValues(operation).Observe(float64(time.Since(began)) / float64(time.Millisecond))
	if err != nil && !errdefs.IsAlreadyExists(err) && !errdefs.IsNotFound(err) {
		s.m.failures.WithLabelValues(operation).Inc()
	}
}

func (s measured) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) (m []mount.Mount, err error) {
	defer func(t time.Time) { s.done("PREPARE", t, err) }(time.Now())
	return s.Snapshotter.Prepare(ctx, key, parent, opts...)
}

func (s measured) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) (m []mount.Mount, err error) {
	defer func(t time.Time) { s.done("VIEW", t, err) }(time.Now())
	return s.Snapshotter.View(ctx, key, parent, opts...)
}

func (s measured) Mounts(ctx context.Context, key string) (m []mount.Mount, err error) {
	defer func(t time.Time) { s.done("MOUNTS", t, err) }(time.Now())
	return s.Snapshotter.Mounts(ctx, key)
}

func (s measured) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) (err error) {
	defer func(t time.Time) { s.done("COMMIT", t, err) }(time.Now())
	return s.Snapshotter.Commit(ctx, name, key, opts...)
}

func (s measured) Remove(ctx context.Context, key string) (err error) {
	defer func(t time.Time) { s.done("REMOVE", t, err) }(time.Now())
	return s.Snapshotter.Remove(ctx, key)
}

// Cleanup is snapshots.Cleaner's.
func (s measured) Cleanup(ctx context.Context) (err error) {
	defer func(t time.Time) { s.done("CLEANUP", t, err) }(time.Now())
	return s.cleaner.Cleanup(ctx)
}

// readingTime is how long the daemon may take to answer a collection.
const readingTime = 3 * time.Second

// A reader tells what is read when metrics are asked for.
type reader struct {
	images imageKeeper
	daemon interface {
		Version(ctx context.Context) (api.VersionInfo, error)
		Cache(ctx context.Context) (api.Cache, error)
	}
	began time.Time
}

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// Describe tells nothing: what there is depends on the daemon.
func (reader) Describe(chan<- *prometheus.Desc) {}

// Collect is prometheus.Collector's.
func (r reader) Collect(to chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), readingTime)
	defer cancel()
	tell := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	r.tellProcess(tell)
	if images, err := r.images.Images(ctx); err == nil {
		count := map[string]int{"mounted": 0, "failed": 0, "idle": 0}
		for _, i := range images {
			switch {
			case i.Mounted:
				count["mounted"]++
			case i.Failure != "":
				count["failed"]++
			default:
				count["idle"]++
			}
		}
		for state, n := range count {
			tell(gauge("erofsd_snapshotter_images", "Lazy images: mounted, failed (to be mounted when they were wanted last), or idle.", "state"), float64(n), state)
		}
	}
	up := gauge("erofsd_snapshotter_daemon_up", "Whether erofsd answers.")
	version, err := r.daemon.Version(ctx)
	if err != nil {
		tell(up, 0)
		return
	}
	tell(up, 1)
	tell(gauge("nydusd_counts", "Daemons, by their version.", "version"), 1, version.Version)
	tell(gauge("nydusd_rss_kilobytes", "Memory of the daemon.", "daemon_id"), residentKiB(version.PID), daemonID)
	if cache, err := r.daemon.Cache(ctx); err == nil {
		tell(gauge("snapshotter_cache_usage_kilobytes", "Disk that the daemon's cache takes."), float64(cache.Bytes)/1024)
	}
}

// tellProcess tells of this process by nydus-snapshotter's names.
func (r reader) tellProcess(tell func(*prometheus.Desc, float64, ...string)) {
	var used syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &used) == nil {
		seconds := func(t syscall.Timeval) float64 { return time.Duration(t.Nano()).Seconds() }
		tell(gauge("snapshotter_cpu_user_time_seconds", "Processor time of the snapshotter in user mode."), seconds(used.Utime))
		tell(gauge("snapshotter_cpu_system_time_seconds", "Processor time of the snapshotter in the kernel."), seconds(used.Stime))
	}
	tell(gauge("snapshotter_memory_usage_kilobytes", "Memory of the snapshotter."), residentKiB(os.Getpid()))
	tell(gauge("snapshotter_run_time_seconds", "Since the snapshotter was started."), time.Since(r.began).Seconds())
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		tell(gauge("snapshotter_fd_counts", "Open files of the snapshotter."), float64(len(fds)-1)) // without that which reads them
	}
	if threads, err := os.ReadDir("/proc/self/task"); err == nil {
		tell(gauge("snapshotter_thread_counts", "Threads of the snapshotter."), float64(len(threads)))
	}
}
