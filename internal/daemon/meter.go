package daemon

import (
	"context"
	"sync"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/internal/api/nydus"
)

// A meter counts the reads of a store as nydusd's API shows them.
type meter struct {
	backend.Store

	mu  sync.Mutex // guards what follows
	sum nydus.BackendMetrics
}

// Open opens a blob whose reads are counted.
func (m *meter) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	b, err := m.Store.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	return &metered{b, m}, nil
}

type metered struct {
	backend.Blob
	m *meter
}

func (b *metered) ReadAt(ctx context.Context, p []byte, off int64) error {
	start := time.Now()
	err := b.Blob.ReadAt(ctx, p, off)
	b.m.count(len(p), time.Since(start), err)
	return err
}

// Upper bounds of the classes of nydus.BackendMetrics.
var (
	latencyClasses = [...]int64{1, 20, 50, 100, 500, 1000, 2000}                                     // milliseconds
	sizeClasses    = [...]int64{1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20} // bytes
)

func (m *meter) count(n int, took time.Duration, err error) {
	latency, size := 0, 0
	for latency < len(latencyClasses) && took.Milliseconds() > latencyClasses[latency] {
		latency++
	}
	for size < len(sizeClasses) && int64(n) >= sizeClasses[size] {
		size++
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sum.Reads++
	if err != nil {
		m.sum.Errors++
		return
	}
	m.sum.Bytes += uint64(n)
	m.sum.Latency += uint64(took.Milliseconds())
	m.sum.LatencyBySize[size] += uint64(took.Milliseconds())
	m.sum.ReadsBySize[size]++
	m.sum.ReadsByBoth[latency][size]++
}

// addTo adds what m has counted to sum.
func (m *meter) addTo(sum *nydus.BackendMetrics) {
	m.mu.Lock()
	defer m.mu.Unlock()
	sum.Reads += m.sum.Reads
	sum.Errors += m.sum.Errors
	sum.Bytes += m.sum.Bytes
	sum.Latency += m.sum.Latency
	for i := range m.sum.LatencyBySize {
		sum.LatencyBySize[i] += m.sum.LatencyBySize[i]
		sum.ReadsBySize[i] += m.sum.ReadsBySize[i]
		for j := range m.sum.ReadsByBoth[i] {
			sum.ReadsByBoth[i][j] += m.sum.ReadsByBoth[i][j]
		}
	}
}
