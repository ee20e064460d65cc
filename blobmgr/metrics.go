package blobmgr

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	fillWait prometheus.Histogram
	requests *prometheus.CounterVec
	fetched  *prometheus.CounterVec
	corrupt  prometheus.Counter
	open     prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		fillWait: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "erofsd_blobmgr_fill_wait_seconds", Help: "How long reads waited for absent data.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 18),
		}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "erofsd_blobmgr_requests_total", Help: "Reads from backends, by reason (demand, readahead, completion).",
		}, []string{"reason"}),
		fetched: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "erofsd_blobmgr_fetched_bytes_total", Help: "Stored bytes read from backends, by reason.",
		}, []string{"reason"}),
		corrupt: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "erofsd_blobmgr_corrupt_units_total", Help: "Units whose bytes from a backend did not match their digest.",
		}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "erofsd_blobmgr_open_blobs", Help: "Blobs that are open.",
		}),
	}
	if r != nil {
		r.MustRegister(m.fillWait, m.requests, m.fetched, m.corrupt, m.open)
	}
	return m
}
