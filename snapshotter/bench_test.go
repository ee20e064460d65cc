package snapshotter

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// BenchmarkLife prepares and removes containers of a layer beside 200 others, and reports the
// time that the slowest hundredth of both takes.
func BenchmarkLife(b *testing.B) {
	s, err := New(b.TempDir(), nil, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	prepare := func(key, parent string) {
		if _, err := s.Prepare(b.Context(), key, parent); err != nil {
			b.Fatal(err)
		}
	}
	for i := range 200 {
		prepare("extract", "")
		if err := s.Commit(b.Context(), fmt.Sprint("image-", i), "extract"); err != nil {
			b.Fatal(err)
		}
	}
	var prepared, removed []time.Duration
	for i := 0; b.Loop(); i++ {
		key := fmt.Sprint("container-", i)
		start := time.Now()
		prepare(key, "image-7")
		middle := time.Now()
		if err := s.Remove(b.Context(), key); err != nil {
			b.Fatal(err)
		}
		prepared, removed = append(prepared, middle.Sub(start)), append(removed, time.Since(middle))
	}
	report := func(name string, times []time.Duration) {
		slices.Sort(times)
		b.ReportMetric(float64(times[len(times)*99/100].Microseconds())/1000, name)
	}
	report("ms-p99-prepare", prepared)
	report("ms-p99-remove", removed)
}
