package daemon

import (
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
)

// usageAge is how old the cache's size may be that is told: it takes a look at the
// record of each image that is kept.
const usageAge = 10 * time.Second

// metrics tells Prometheus what the daemon knows, beside what blobmgr and the backends
// count themselves. All but the durations is read when it is asked for. Labels are
// bounded: never an image, a blob or a path.
type metrics struct {
	d         *Daemon
	durations *prometheus.HistogramVec
	served    *prometheus.Desc
	build     *prometheus.Desc
	figures   []figure

	mu      sync.Mutex // guards what follows
	usage   usage      // the last that is known
	asking  bool       // somebody finds out the next
	expires time.Time  // of usage
}

// usage is what the cache takes.
type usage struct {
	known  bool
	bytes  int64
	images int
}

// A reading is the daemon at one moment.
type reading struct {
	kernel api.Kernel
	cache  usage
	errors int64

	mounts, mounted, bound, open, detached, complete, culls int

	blobs, completeBlobs int
	needed, present      int64
	evicted, waits       int64
}

// A figure is one number of a reading.
type figure struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*reading) int64
	// known says whether there is a number; nil: always
	known func(*reading) bool
}

// newMetrics registers d's metrics, and those of its process, with r. They may be asked
// for as soon as d has started.
func newMetrics(r prometheus.Registerer, d *Daemon) *metrics {
	m := &metrics{
		d: d,
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "erofsd_kernel_request_duration_seconds",
			Help:    "Time from taking a request of the kernel to its answer, by operation and result (ok, error).",
			Buckets: prometheus.ExponentialBuckets(0.00005, 2.5, 16), // to 46 s; a fill gets 60 s
		}, []string{"transport", "op", "result"}),
		served: prometheus.NewDesc("erofsd_kernel_served", "Whether the kernel's requests are answered (1) or not (0), and by which transport.", []string{"transport"}, nil),
		build:  prometheus.NewDesc("erofsd_build_info", "What runs; the value is 1.", []string{"version", "commit", "go_version"}, nil),
	}
	m.figures = append(kernelFigures(), append(imageFigures(), cacheFigures(d.o)...)...)
	r.MustRegister(m, m.durations, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func gauge(name, help string, value func(*reading) int64) figure {
	return figure{desc: prometheus.NewDesc("erofsd_"+name, help, nil, nil), kind: prometheus.GaugeValue, value: value}
}

func counter(name, help string, value func(*reading) int64) figure {
	return figure{desc: prometheus.NewDesc("erofsd_"+name, help, nil, nil), kind: prometheus.CounterValue, value: value}
}

func kernelFigures() []figure {
	return []figure{
		counter("kernel_requests_total", "Requests taken from the kernel, malformed ones included.",
			func(r *reading) int64 { return r.kernel.Events }),
		counter("kernel_denied_requests_total", "Requests of the kernel that were answered with an error: their readers got EIO.",
			func(r *reading) int64 { return r.kernel.Denied }),
		counter("kernel_malformed_requests_total", "Requests of the kernel that could not be decoded.",
			func(r *reading) int64 { return r.kernel.Malformed }),
		gauge("kernel_requests_in_flight", "Requests of the kernel that wait for data now.",
			func(r *reading) int64 { return r.kernel.InFlight }),
		counter("fill_errors_total", "Ranges that the kernel asked for and that could not be filled.",
			func(r *reading) int64 { return r.errors }),
	}
}

func imageFigures() []figure {
	return []figure{
		gauge("mounts", "Mount points that the daemon made and did not unmount.",
			func(r *reading) int64 { return int64(r.mounts) }),
		gauge("mounted_images", "Images with a mount point of the daemon.",
			func(r *reading) int64 { return int64(r.mounted) }),
		gauge("bound_images", "Images that are bound.",
			func(r *reading) int64 { return int64(r.bound) }),
		gauge("open_images", "Images whose blobs are open, mounted or not.",
			func(r *reading) int64 { return int64(r.open) }),
		gauge("detached_images", "Open images without a mount of the daemon that the kernel may still read.",
			func(r *reading) int64 { return int64(r.detached) }),
		gauge("complete_images", "Open images all of whose data is in the cache.",
			func(r *reading) int64 { return int64(r.complete) }),
		gauge("open_image_blobs", "Blobs of open images; what images share counts once.",
			func(r *reading) int64 { return int64(r.blobs) }),
		gauge("complete_image_blobs", "Blobs of open images all of whose data is in the cache.",
			func(r *reading) int64 { return int64(r.completeBlobs) }),
		gauge("image_needed_bytes", "Bytes of blobs that the open images can read.",
			func(r *reading) int64 { return r.needed }),
		gauge("image_present_bytes", "Bytes of blobs that the open images can read and that are in the cache.",
			func(r *reading) int64 { return r.present }),
	}
}

func cacheFigures(o Options) []figure {
	known := func(r *reading) bool { return r.cache.known }
	all := []figure{
		gauge("cache_bytes", "Disk that the images take, open or not; at most ten seconds old.",
			func(r *reading) int64 { return r.cache.bytes }),
		gauge("cache_images", "Images of which something is in the cache, open or not; at most ten seconds old.",
			func(r *reading) int64 { return int64(r.cache.images) }),
	}
	for i := range all {
		all[i].known = known
	}
	return append(all,
		gauge("cache_high_bytes", "What the cache may take before images that are not in use go; 0: there is no limit.",
			func(*reading) int64 { return o.High }),
		gauge("cache_low_bytes", "What the cache takes at most after images went from it; 0: there is no limit.",
			func(*reading) int64 { return o.Low }),
		counter("evicted_bytes_total", "Disk that was taken from images in use to keep the cache within its limit.",
			func(r *reading) int64 { return r.evicted }),
		counter("cache_room_waits_total", "Reads that waited until there was room in the cache.",
			func(r *reading) int64 { return r.waits }),
		gauge("cache_pending_culls", "Blobs that are to be removed as soon as the kernel has let go of them.",
			func(r *reading) int64 { return int64(r.culls) }),
	)
}

// Describe is a prometheus.Collector's.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.served
	ch <- m.build
	for _, f := range m.figures {
		ch <- f.desc
	}
}

// Collect is a prometheus.Collector's.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	b := BuildVersion()
	ch <- prometheus.MustNewConstMetric(m.build, prometheus.GaugeValue, 1, b.Version, b.Commit, runtime.Version())
	served := 0.0
	if m.d.serving.Load() {
		served = 1
	}
	ch <- prometheus.MustNewConstMetric(m.served, prometheus.GaugeValue, served, m.d.kernel.name())
	r := m.read()
	for _, f := range m.figures {
		if f.known == nil || f.known(r) {
			ch <- prometheus.MustNewConstMetric(f.desc, f.kind, float64(f.value(r)))
		}
	}
}

// read looks at the daemon.
func (m *metrics) read() *reading {
	d := m.d
	r := &reading{kernel: d.kernel.stats(), cache: m.cacheUsage(), errors: d.events.list().TotalErrors}
	r.evicted, r.waits = d.blobs.Evicted()
	var open []*image
	var devices []*device
	d.mu.Lock()
	r.culls = len(d.culls)
	mounted := map[*image]bool{}
	for _, t := range d.mounts {
		if t.img != nil {
			r.mounts++
			mounted[t.img] = true
		}
	}
	r.mounted = len(mounted)
	for _, b := range d.bindings {
		if !b.left {
			r.bound++
		}
	}
	for _, img := range d.images {
		if !img.isOpen() {
			continue
		}
		open = append(open, img)
		if img.refs == 0 {
			r.detached++
		}
	}
	for _, v := range d.devices {
		devices = append(devices, v)
	}
	d.mu.Unlock()
	r.open, r.blobs = len(open), len(devices)
	complete := map[*device]bool{}
	for _, v := range devices {
		s := v.blob.Stats()
		r.needed += s.Needed
		r.present += s.Present
		if s.Complete {
			complete[v] = true
		}
	}
	r.completeBlobs = len(complete)
	for _, img := range open {
		if img.allIn(complete) {
			r.complete++
		}
	}
	return r
}

// allIn reports whether all of img's blobs are in set. It is open.
func (img *image) allIn(set map[*device]bool) bool {
	for _, v := range img.devices {
		if !set[v] {
			return false
		}
	}
	return true
}

// cacheUsage returns what the cache takes, or took a moment ago. While somebody finds
// it out, others get what is known.
func (m *metrics) cacheUsage() usage {
	m.mu.Lock()
	if m.asking || time.Now().Before(m.expires) {
		defer m.mu.Unlock()
		return m.usage
	}
	m.asking = true
	m.mu.Unlock()
	u := usage{}
	all, err := m.d.listKept()
	if err == nil {
		u = usage{known: true, bytes: m.d.usage(all), images: len(all)}
	} else {
		m.d.log.Warn("the size of the cache is not known to metrics", "err", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.usage, m.asking, m.expires = u, false, time.Now().Add(usageAge)
	return u
}

// fanotify is told of the events of a group.
func (m *metrics) fanotify(op fanotify.Op, took time.Duration, err error) {
	m.observe(Fanotify, string(op), took, err)
}

// cachefiles is told of the requests of a device.
func (m *metrics) cachefiles(op cachefiles.Op, took time.Duration, err error) {
	m.observe(Cachefiles, string(op), took, err)
}

func (m *metrics) observe(transport, op string, took time.Duration, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.durations.WithLabelValues(transport, op, result).Observe(took.Seconds())
}
