package backend

import (
	"context"
	"errors"
	"io/fs"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Totals is what a store has done since it was made.
type Totals struct {
	Requests int64 // calls of ReadAt
	Bytes    int64 // bytes of those that succeeded
}

// Metrics returns a store that counts calls, bytes, errors and durations, with
// the label backend=name. Several stores may share r and name; r may be nil, then
// only [Metered.Totals] tells. Put it innermost to count each attempt, outermost
// to count what callers asked for.
func Metrics(s Store, r prometheus.Registerer, name string) *Metered {
	labels := prometheus.Labels{"backend": name}
	return &Metered{
		store: s,
		bytes: register(r, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "erofsd_backend_read_bytes_total", Help: "Bytes read from backends.",
		}, []string{"backend"})).With(labels),
		calls: register(r, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "erofsd_backend_requests_total", Help: "Calls of backends, by operation (open, read) and result.",
		}, []string{"backend", "op", "result"})).MustCurryWith(labels),
		seconds: register(r, prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "erofsd_backend_request_duration_seconds", Help: "How long calls of backends took.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}, []string{"backend", "op"})).MustCurryWith(labels),
	}
}

// register adds c to r, or returns the collector that was added before.
func register[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		return c
	}
	err := r.Register(c)
	if again, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		return again.ExistingCollector.(C)
	}
	if err != nil {
		panic("backend: internal error: " + err.Error())
	}
	return c
}

// Metered is a [Store] that counts. Make one with [Metrics].
type Metered struct {
	store     Store
	bytes     prometheus.Counter
	calls     *prometheus.CounterVec
	seconds   prometheus.ObserverVec
	requested atomic.Int64
	delivered atomic.Int64
}

// Totals returns the counts so far of this store alone.
func (m *Metered) Totals() Totals {
	return Totals{Requests: m.requested.Load(), Bytes: m.delivered.Load()}
}

// Open opens a blob whose reads are counted.
func (m *Metered) Open(ctx context.Context, ref Ref) (Blob, error) {
	start := time.Now()
	b, err := m.store.Open(ctx, ref)
	m.count("open", start, err)
	if err != nil {
		return nil, err
	}
	return &meteredBlob{b, m}, nil
}

func (m *Metered) count(op string, start time.Time, err error) {
	m.calls.WithLabelValues(op, result(err)).Inc()
	m.seconds.WithLabelValues(op).Observe(time.Since(start).Seconds())
}

// result is the bounded label for an outcome.
func result(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.Canceled):
		return "canceled"
	case errors.Is(err, fs.ErrNotExist):
		return "missing"
	case errors.Is(err, fs.ErrPermission):
		return "denied"
	case Temporary(err):
		return "temporary"
	}
	return "error"
}

type meteredBlob struct {
	Blob
	m *Metered
}

func (b *meteredBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	start := time.Now()
	b.m.requested.Add(1)
	err := b.Blob.ReadAt(ctx, p, off)
	if err == nil {
		b.m.delivered.Add(int64(len(p)))
		b.m.bytes.Add(float64(len(p)))
	}
	b.m.count("read", start, err)
	return err
}
