package chunk

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"hash"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
)

func sha() hash.Hash { return sha256.New() }

// fuzzBlob is a small blob that every fuzz target starts from.
func fuzzBlob(t testing.TB) (blob []byte, e Entry) {
	return build(t, sample(9_000), CodecZstd, BLAKE3, 4096)
}

// allocated runs f and fails when it allocates more than limit bytes.
func allocated(t *testing.T, limit uint64, f func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > limit {
		t.Fatalf("%d bytes allocated, want at most %d", n, limit)
	}
}

func classified(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrCorrupt) && !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("error %v is neither ErrCorrupt nor errors.ErrUnsupported", err)
	}
}

// batchBlob is a blob of a batch of two chunks, a chunk and a batch of one.
func batchBlob(t testing.TB) (*Table, []byte) {
	t.Helper()
	p := sample(5000)
	stored, _ := newEncoder(t, CodecZstd).Encode(nil, p[:4100])
	e := Entry{
		ID: "batch", ChunkSize: 8192, ChunkCount: 4, Codec: CodecZstd, Size: 4 * 4096,
		Features: FeatureAligned | FeatureChunkInfoV2 | FeatureBatch | FeatureCapTarTOC,
		MetaOff:  int64(len(stored)) + 5 + 6, MetaLen: 4*24 + 2*40, MetaCLen: 4*24 + 2*40,
	}
	coff := uint64(len(stored))
	table, err := ParseTable((&Table{
		entry: e,
		chunks: []place{
			{page: 0, n: 4000 - 1 | placeBatch},
			{page: 1, n: 100 - 1 | placeBatch},
			{page: 2, n: 5 - 1, c: coff | 4<<40},
			{page: 3, n: 6 - 1 | placeBatch, c: coff + 5 | 1<<40},
		},
		batches: []batch{{uint32(len(stored)), 4100}, {6, 6}},
	}).Marshal(), e)
	if err != nil {
		t.Fatal(err)
	}
	for i, at := range []int{0, 4000, 4100, 4105} {
		c := table.Chunk(i)
		if _, err := table.SetDigest(i, c.Off, c.Len, BLAKE3.Sum(p[at:at+int(c.Len)])); err != nil {
			t.Fatal(err)
		}
	}
	return table, append(slices.Clone(stored), p[4100:4111]...)
}

func TestBatch(t *testing.T) {
	table, blob := batchBlob(t)
	if table.Units() != 3 || table.UnitOf(1) != 0 || table.UnitAt(3*4096+1) != 2 {
		t.Errorf("%d units", table.Units())
	}
	p := sample(5000)
	cache := decodeAll(t, table, blob)
	for i, want := range [][]byte{p[:4000], p[4000:4100], p[4100:4105], p[4105:4111]} {
		if got := cache[i*4096:][:len(want)]; !bytes.Equal(got, want) {
			t.Errorf("chunk %d differs", i)
		}
	}
}

func FuzzParseEntry(f *testing.F) {
	_, e := fuzzBlob(f)
	p := e.Marshal()
	f.Add(p[:])
	nydus, err := os.ReadFile(filepath.Join("testdata", "entries"))
	if err != nil {
		f.Fatal(err)
	}
	for p := range slices.Chunk(nydus, entrySize) {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		e, err := ParseEntry(p)
		if err != nil {
			classified(t, err)
			return
		}
		raw := e.Marshal()
		again, err := ParseEntry(raw[:])
		if err != nil || again != e {
			t.Fatalf("%+v came back as %+v, %v", e, again, err)
		}
		if e.DataEnd() < 0 || e.DataEnd() > maxCompressed {
			t.Fatalf("data end %d", e.DataEnd())
		}
	})
}

func FuzzParseTable(f *testing.F) {
	blob, e := fuzzBlob(f)
	v2, _ := tableV2(f, CodecGzip, [][]byte{{1}, {2, 3}}, [][]byte{sample(20), sample(5000)})
	batches, _ := batchBlob(f)
	for _, table := range []*Table{tableOf(f, blob, e), v2, batches} {
		p := table.entry.Marshal()
		f.Add(p[:], table.Marshal())
	}
	f.Fuzz(func(t *testing.T, entry, p []byte) {
		e, err := ParseEntry(entry)
		if err != nil {
			return
		}
		// A table never takes more memory than a few times its local form.
		allocated(t, uint64(5*len(p)+100_000), func() {
			table, err := ParseTable(p, e)
			if err != nil {
				classified(t, err)
				return
			}
			checkTable(t, table, e)
		})
	})
}

func FuzzTOC(f *testing.F) {
	blob, e := fuzzBlob(f)
	f.Add(blob, true)
	f.Add(blob[len(blob)-int(e.TOCSize):], false)
	f.Fuzz(func(t *testing.T, blob []byte, sized bool) {
		e := e
		e.MetaCodec, e.MetaOff, e.MetaCLen, e.MetaLen = 0, 0, 0, 0
		if !sized {
			e.TOCSize = 0 // and nothing vouches for the TOC
		}
		allocated(t, 16<<20, func() {
			m := &memory{p: blob}
			if table, err := ReadTable(background, m, e); err == nil {
				checkTable(t, table, e)
			} else {
				classified(t, err)
			}
			if d, err := ReadDigests(background, m, e); err == nil && len(d) != int(e.ChunkCount) {
				t.Fatalf("%d digests", len(d))
			} else if err != nil {
				classified(t, err)
			}
			if m.reads > 5 {
				t.Fatalf("%d reads", m.reads)
			}
		})
	})
}

func FuzzDecode(f *testing.F) {
	p := sample(5000)
	for _, c := range []Codec{CodecLZ4, CodecZstd} {
		out, _ := newEncoder(f, c).Encode(nil, p)
		f.Add(uint32(c), out)
	}
	f.Add(uint32(CodecGzip), gzipped(f, p))
	want := BLAKE3.Sum(p)
	d := NewDecoder()
	f.Cleanup(d.Close)
	f.Fuzz(func(t *testing.T, codec uint32, src []byte) {
		if len(src) == 0 || len(src) >= 1<<20 {
			return
		}
		c := Codec(1 + (codec-1)%3)
		table, _ := tableV2(t, c, [][]byte{src}, [][]byte{p})
		dst := make([]byte, table.Size())
		// Room for the state of a codec, not for what src claims to be.
		allocated(t, 4<<20, func() {
			err := d.Decode(table, 0, dst, src)
			if err != nil {
				classified(t, err)
			} else if got := BLAKE3.Sum(dst[:len(p)]); got != want {
				t.Fatalf("decoded to %v", got)
			}
		})
	})
}
