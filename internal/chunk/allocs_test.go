//go:build !race

// Under the race detector sync.Pool forgets at random, which zstd's decoder uses.

package chunk

import "testing"

// The promise of Table's comment.
func TestMemoryPerChunk(t *testing.T) {
	const n = 100_000
	r := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		e := Entry{ChunkSize: 4096, ChunkCount: n, Size: n * 4096, CompressedSize: n, Features: FeatureAligned | FeatureSeparate, MetaCLen: 16 * n, MetaLen: 16 * n}
		tmp := &Table{entry: e, chunks: make([]place, n)}
		for i := range tmp.chunks {
			tmp.chunks[i] = place{page: uint32(i), c: uint64(i)}
		}
		p := tmp.Marshal()
		for b.Loop() {
			if _, err := ParseTable(p, e); err != nil {
				b.Fatal(err)
			}
		}
	})
	if got := r.AllocedBytesPerOp() / n; got < 40 || got > 48 {
		t.Errorf("%d bytes a chunk", got)
	}
}

func TestAllocs(t *testing.T) {
	d := NewDecoder()
	defer d.Close()
	plain := sample(300_000)
	check := func(name string, table *Table, blob []byte) {
		u := table.UnitOf(min(20, table.Len()-1))
		x := table.Unit(u)
		dst, src := make([]byte, x.Len), blob[x.COff:x.COff+x.CLen]
		if n := testing.AllocsPerRun(20, func() {
			if err := d.Decode(table, u, dst, src); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("decode %s: %v allocations", name, n)
		}
		if n := testing.AllocsPerRun(20, func() {
			if err := table.Verify(u, dst); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("verify %s: %v allocations", name, n)
		}
	}
	for _, c := range []Codec{CodecNone, CodecLZ4, CodecZstd} {
		blob, e := build(t, plain, c, BLAKE3, 256<<10)
		check(c.String(), tableOf(t, blob, e), blob)
	}
	table, blob := tableV2(t, CodecGzip, [][]byte{gzipped(t, plain)}, [][]byte{plain})
	check("gzip", table, blob)
	table, blob, _ = open(t, "sha256-64k", 0)
	check("sha256", table, blob)
	table, blob, _ = open(t, "batch", 0)
	check("batch", table, blob)
	off := int64(0)
	if n := testing.AllocsPerRun(100, func() {
		off = (off + 1<<20 + 4096) % table.Size()
		u := table.UnitAt(off)
		if x := table.Unit(u); off < x.Off || !table.Needed(u) || table.Chunk(x.First).Len == 0 {
			t.Fatal(off)
		}
	}); n != 0 {
		t.Errorf("lookup: %v allocations", n)
	}
}
