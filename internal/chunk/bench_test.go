package chunk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// material is 32 MiB of what root file systems are made of: programs and libraries
// of this machine, in the order of their names.
var material = sync.OnceValue(func() []byte {
	var p []byte
	filepath.WalkDir("/usr/lib", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if i, err := d.Info(); err != nil || i.Size() > 4<<20 {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		if p = append(p, b...); len(p) >= 32<<20 {
			return fs.SkipAll
		}
		return nil
	})
	return p
})

// build makes a blob of p, cut into chunks of n bytes.
func build(t testing.TB, p []byte, c Codec, d Digester, n int) (blob []byte, e Entry) {
	t.Helper()
	enc := newEncoder(t, c)
	tail := Tail{Codec: c, Digester: d, ChunkSize: uint32(n)}
	var off int64
	for len(p) > 0 {
		q := p[:min(n, len(p))]
		p = p[len(q):]
		out, compressed := enc.Encode(nil, q)
		tail.Chunks = append(tail.Chunks, Chunk{
			Off: off, Len: int64(len(q)), COff: int64(len(blob)), CLen: int64(len(out)),
			Compressed: compressed, Digest: d.Sum(q), Known: true,
		})
		off += roundUp(int64(len(q)))
		blob = append(blob, out...)
	}
	tail.DataLen, tail.DataDigest = int64(len(blob)), sha256.New()
	tail.DataDigest.Write(blob)
	var w bytes.Buffer
	e, err := WriteTail(&w, tail)
	if err != nil {
		t.Fatal(err)
	}
	e.ID = "built"
	return append(blob, w.Bytes()...), e
}

// tableOf reads the table and the digests of a blob that build made.
func tableOf(t testing.TB, blob []byte, e Entry) *Table {
	t.Helper()
	table, err := ReadTable(context.Background(), &memory{p: blob}, e)
	if err != nil {
		t.Fatal(err)
	}
	digests, err := ReadDigests(context.Background(), &memory{p: blob}, e)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range digests {
		c := table.Chunk(i)
		if _, err := table.SetDigest(i, c.Off, c.Len, d); err != nil {
			t.Fatal(err)
		}
	}
	return table
}

func BenchmarkDecode(b *testing.B) {
	for _, x := range []struct {
		c Codec
		d Digester
	}{{CodecZstd, BLAKE3}, {CodecZstd, SHA256}, {CodecLZ4, BLAKE3}, {CodecNone, BLAKE3}} {
		b.Run(x.c.String()+"-"+x.d.String(), func(b *testing.B) {
			blob, e := build(b, material(), x.c, x.d, 256<<10)
			table := tableOf(b, blob, e)
			d := NewDecoder()
			defer d.Close()
			dst := make([]byte, 256<<10)
			b.SetBytes(table.Size() / int64(table.Units()))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				x := table.Unit(i % table.Units())
				if err := d.Decode(table, i%table.Units(), dst[:x.Len], blob[x.COff:x.COff+x.CLen]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkDecodeBatch(b *testing.B) {
	table, blob, _ := open(b, "batch", 0)
	u := table.UnitOf(20)
	x := table.Unit(u)
	d := NewDecoder()
	defer d.Close()
	dst := make([]byte, x.Len)
	b.SetBytes(x.Len)
	b.ReportAllocs()
	for b.Loop() {
		if err := d.Decode(table, u, dst, blob[x.COff:x.COff+x.CLen]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	for _, x := range []struct {
		name  string
		c     Codec
		level int
	}{{"zstd-fastest", CodecZstd, 1}, {"zstd-default", CodecZstd, 0}, {"zstd-better", CodecZstd, 8}, {"lz4", CodecLZ4, 0}} {
		b.Run(x.name, func(b *testing.B) {
			e, err := NewEncoder(x.c, x.level)
			if err != nil {
				b.Fatal(err)
			}
			defer e.Close()
			const n = 256 << 10
			p := material()
			chunks := len(p) / n
			dst := make([]byte, 0, 2*n)
			var in, out int
			b.SetBytes(n)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				at := i % chunks * n
				q, _ := e.Encode(dst, p[at:at+n])
				in, out = in+n, out+len(q)
			}
			b.ReportMetric(float64(in)/float64(out), "ratio")
		})
	}
}

func BenchmarkSum(b *testing.B) {
	for _, d := range []Digester{BLAKE3, SHA256} {
		b.Run(d.String(), func(b *testing.B) {
			p := material()[:256<<10]
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				d.Sum(p)
			}
		})
	}
}

func BenchmarkUnitAt(b *testing.B) {
	for _, image := range []string{"zstd", "batch"} {
		b.Run(image, func(b *testing.B) {
			table, _, _ := open(b, image, 0)
			r := rand.New(rand.NewPCG(1, 2))
			b.ReportAllocs()
			for b.Loop() {
				table.Unit(table.UnitAt(r.Int64N(table.Size())))
			}
		})
	}
}
