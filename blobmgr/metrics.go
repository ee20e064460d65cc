package blobmgr

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	fillWait prometheus.Histogram
	requests *prometheus.CounterVec
	fetched  *prometheus.CounterVec
	corrupt  prometheus.Counter
	open     prometheus.Gauge

	scrubBytes, scrubWrong, scrubRepaired, scrubUnrepaired prometheus.Counter
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
	count := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m.scrubBytes = count("erofsd_scrub_verified_bytes_total", "Bytes of the cache that scrubs have verified.")
	m.scrubWrong = count("erofsd_scrub_wrong_units_total", "Units of the cache that a scrub found to be wrong.")
	m.scrubRepaired = count("erofsd_scrub_repaired_units_total", "Wrong units of the cache that a scrub repaired: fetched again, or to be fetched when they are read.")
	m.scrubUnrepaired = count("erofsd_scrub_unrepaired_units_total", "Wrong units of the cache that a scrub could not repair.")
	if r != nil {
		r.MustRegister(m.fillWait, m.requests, m.fetched, m.corrupt, m.open, m.scrubBytes, m.scrubWrong, m.scrubRepaired, m.scrubUnrepaired)
	}
	return m
}
