package blobmgr

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// TestLargeUnitsMemory: 32 readers of chunks of 16 MiB that are nothing as stored cost no
// more than a few of them at a time.
func TestLargeUnitsMemory(t *testing.T) {
	lens := make([]int, 12)
	for i := range lens {
		lens[i] = 16 << 20
	}
	x := makeZeros(t, lens)
	live := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	var peak atomic.Int64
	o := quietOptions()
	o.wrap = func(f cacheFile) cacheFile {
		return &hookedFile{cacheFile: f, write: func(int64, int) error {
			for n, p := live(), peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
			}
			return nil
		}}
	}
	m := newManager(t, o)
	before := live()
	b := open(t, m, x.source(&store{stored: x.stored}))
	defer closeBlob(t, b)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			u := b.table.Unit(i % b.table.Units())
			if err := b.Fill(t.Context(), u.Off, u.Len); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	runtime.KeepAlive(x)
	if n := peak.Load() - before; n > 64<<20 || n < 16<<20 {
		t.Errorf("%d bytes in use, want those of some units and no more than 64 MiB", n)
	}
}
