package chunk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
)

var background = context.Background()

// sample is reproducible content: text-like, random and zero runs, with a length
// that is no multiple of anything.
func sample(n int) []byte {
	r := rand.New(rand.NewPCG(7, uint64(n)))
	p := make([]byte, n)
	for i := range p {
		switch i >> 16 % 3 {
		case 0:
			p[i] = "the quick brown fox "[r.IntN(20)]
		case 1:
			p[i] = byte(r.Uint32())
		}
	}
	return p
}

// TestRoundTrip writes blobs as the converter does and reads them in every way.
func TestRoundTrip(t *testing.T) {
	plain := sample(5<<18 + 4097)
	for _, c := range []Codec{CodecNone, CodecLZ4, CodecZstd} {
		for _, d := range []Digester{BLAKE3, SHA256} {
			t.Run(c.String()+"-"+d.String(), func(t *testing.T) {
				blob, e := build(t, plain, c, d, 64<<10)
				raw := e.Marshal()
				if again, err := ParseEntry(raw[:]); err != nil || again != e {
					t.Fatalf("entry: %+v, %v, want %+v", again, err, e)
				}
				if e.CompressedSize != int64(len(blob)) || e.DataEnd() != e.MetaOff-512 {
					t.Errorf("size %d, data end %d, of a blob of %d bytes", e.CompressedSize, e.DataEnd(), len(blob))
				}
				table := tableOf(t, blob, e)
				if got := decodeAll(t, table, blob)[:len(plain)]; !bytes.Equal(got, plain) {
					t.Error("decoded bytes differ")
				}
				if again, _ := build(t, plain, c, d, 64<<10); !bytes.Equal(again, blob) {
					t.Error("the same input gave another blob")
				}

				// By the TOC: with its size known, and without.
				byTOC := e
				byTOC.MetaCodec, byTOC.MetaOff, byTOC.MetaCLen, byTOC.MetaLen = 0, 0, 0, 0
				for _, size := range []uint32{e.TOCSize, 0} {
					byTOC.TOCSize = size
					m := &memory{p: blob}
					got, err := ReadTable(background, m, byTOC)
					if err != nil || m.reads > 3 {
						t.Fatalf("by TOC of size %d: %v, %d reads", size, err, m.reads)
					}
					if got.entry.DataEnd() != e.DataEnd() || !slices.Equal(got.chunks, table.chunks) || !bytes.Equal(got.Marshal(), table.Marshal()) {
						t.Error("the TOC leads to another table")
					}
				}

				// Separate: the table in an object of its own.
				apart := e
				apart.Features |= FeatureSeparate
				apart.CompressedSize = e.DataEnd()
				got, err := ReadTable(background, &memory{p: blob}, apart)
				if err != nil || !slices.Equal(got.chunks, table.chunks) {
					t.Errorf("separate: %v", err)
				}
			})
		}
	}
}

// The tail must look to nydus as its own, so its layout is pinned byte by byte.
func TestTailLayout(t *testing.T) {
	blob, e := build(t, sample(3*4096), CodecZstd, BLAKE3, 4096)
	at := e.DataEnd()
	for _, x := range []struct {
		name string
		n    int64 // in front of the header
	}{{"image.blob", 0}, {"blob.meta", e.MetaCLen + 4096}, {"blob.digest", 3 * 32}, {"rafs.blob.toc", 4 * 128}} {
		at += x.n
		size := x.n
		if x.name == "image.blob" {
			size = at
		}
		name, n, ok := parseTarHeader(blob[at : at+512])
		if name != x.name || n != size || !ok {
			t.Errorf("header at %d: %q of %d bytes, %v, want %q of %d", at, name, n, ok, x.name, size)
		}
		at += 512
	}
	if at != int64(len(blob)) {
		t.Errorf("the last header ends at %d of %d", at, len(blob))
	}
}

func TestTarHeader(t *testing.T) {
	for _, n := range []int64{0, 1, 511, 1<<33 - 1} {
		if name, got, ok := parseTarHeader(tarHeader("blob.meta", n)); name != "blob.meta" || got != n || !ok {
			t.Errorf("%d: %q %d %v", n, name, got, ok)
		}
	}
	if p := tarHeader("image.blob", 1<<33); p[124] != 0x80 || binary.BigEndian.Uint64(p[128:]) != 1<<33 {
		t.Errorf("8 GiB: %x", p[124:136])
	}
	if got := string(tarHeader("a", 8)[124:136]); got != "00000000010\x00" {
		t.Errorf("size field %q", got)
	}
}

func TestWriteTailRefuses(t *testing.T) {
	good := Chunk{Off: 0, Len: 5, COff: 0, CLen: 5, Digest: Digest{1}, Known: true}
	for name, edit := range map[string]func(x *Tail){
		"no chunks":          func(x *Tail) { x.Chunks = nil },
		"gap":                func(x *Tail) { x.Chunks[0].Off = 4096 },
		"unaligned":          func(x *Tail) { x.Chunks[0].Off = 1 },
		"no digest":          func(x *Tail) { x.Chunks[0].Digest = Digest{} },
		"beyond the data":    func(x *Tail) { x.DataLen = 4 },
		"compressed larger":  func(x *Tail) { x.Chunks[0].Compressed, x.Chunks[0].CLen = true, 6 },
		"raw of other size":  func(x *Tail) { x.Chunks[0].CLen = 4 },
		"larger than chunks": func(x *Tail) { x.Chunks[0].Len, x.Chunks[0].CLen, x.DataLen = 4097, 4097, 4097 },
		"gzip":               func(x *Tail) { x.Codec = CodecGzip },
		"chunk size":         func(x *Tail) { x.ChunkSize = 5 },
	} {
		tail := Tail{Chunks: []Chunk{good}, DataLen: 5, DataDigest: sha(), Codec: CodecZstd, ChunkSize: 4096}
		if _, err := WriteTail(io.Discard, tail); err != nil {
			t.Fatal(err)
		}
		edit(&tail)
		if e, err := WriteTail(io.Discard, tail); err == nil {
			t.Errorf("%s: written as %+v", name, e)
		}
	}
	tail := Tail{Chunks: []Chunk{good}, DataLen: 5, DataDigest: sha(), ChunkSize: 4096}
	if _, err := WriteTail(failingWriter{}, tail); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("write error: %v", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// tableV2 builds a version 2 table of one compressed chunk for each of parts.
func tableV2(t testing.TB, c Codec, stored [][]byte, plain [][]byte) (*Table, []byte) {
	t.Helper()
	e := Entry{
		ID: "v2", ChunkSize: 1 << 20, ChunkCount: uint32(len(stored)), Codec: c,
		Features: FeatureAligned | FeatureChunkInfoV2 | FeatureCapTarTOC,
	}
	tmp := &Table{}
	var blob []byte
	for i, s := range stored {
		tmp.chunks = append(tmp.chunks, place{
			page: uint32(e.Size / pageSize), n: uint32(len(plain[i])-1) | placeCompressed,
			c: uint64(len(blob)) | uint64(len(s)-1)<<40,
		})
		blob = append(blob, s...)
		e.Size += roundUp(int64(len(plain[i])))
	}
	e.MetaOff, e.MetaLen = int64(len(blob)), int64(24*len(stored))
	e.MetaCLen = e.MetaLen
	tmp.entry = e
	table, err := ParseTable(tmp.Marshal(), e)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range plain {
		if _, err := table.SetDigest(i, table.Chunk(i).Off, int64(len(p)), BLAKE3.Sum(p)); err != nil {
			t.Fatal(err)
		}
	}
	return table, blob
}

func newEncoder(t testing.TB, c Codec) *Encoder {
	t.Helper()
	e, err := NewEncoder(c, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e
}

func gzipped(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestVersion2(t *testing.T) {
	plain := [][]byte{sample(100), sample(70_000), sample(4096)}
	var stored [][]byte
	for _, p := range plain {
		stored = append(stored, gzipped(t, p))
	}
	table, blob := tableV2(t, CodecGzip, stored, plain)
	cache := decodeAll(t, table, blob)
	for i, p := range plain {
		c := table.Chunk(i)
		if !bytes.Equal(cache[c.Off:c.Off+c.Len], p) {
			t.Errorf("chunk %d differs", i)
		}
	}
	// Version 2 says that a chunk is compressed by a flag, not by its size.
	if c := table.Chunk(0); !c.Compressed {
		t.Errorf("chunk 0: %+v", c)
	}
}

// TestCorruptData flips, cuts and swaps stored bytes of every codec: each is a
// CorruptError, and the decoder is as good as new for the next unit.
func TestCorruptData(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	plain := sample(300_000)
	type blobTable struct {
		name  string
		table *Table
		blob  []byte
	}
	var all []blobTable
	for _, c := range []Codec{CodecNone, CodecLZ4, CodecZstd} {
		blob, e := build(t, plain, c, BLAKE3, 1<<20)
		all = append(all, blobTable{c.String(), tableOf(t, blob, e), blob})
	}
	table, blob := tableV2(t, CodecGzip, [][]byte{gzipped(t, plain)}, [][]byte{plain})
	all = append(all, blobTable{"gzip", table, blob})
	table, blob, _ = open(t, "batch", 0)
	all = append(all, blobTable{"batch", table, blob})

	for _, x := range all {
		t.Run(x.name, func(t *testing.T) {
			d := NewDecoder()
			defer d.Close()
			u := x.table.UnitOf(min(20, x.table.Len()-1))
			unit := x.table.Unit(u)
			good := x.blob[unit.COff : unit.COff+unit.CLen]
			dst := make([]byte, unit.Len)
			for range 200 {
				bad := slices.Clone(good)
				for range 1 + r.IntN(3) {
					bad[r.IntN(len(bad))] ^= byte(1 + r.IntN(255))
				}
				err := d.Decode(x.table, u, dst, bad)
				// A flip in a header or checksum that no byte depends on may do no
				// harm, but then the bytes are right.
				if err == nil {
					err = x.table.Verify(u, dst)
					if err != nil {
						t.Fatalf("decoded wrong bytes: %v", err)
					}
					continue
				}
				var corrupt *CorruptError
				if !errors.As(err, &corrupt) || !errors.Is(err, ErrCorrupt) {
					t.Fatalf("error %v, want a CorruptError", err)
				}
				if corrupt.Chunk < unit.First || corrupt.Chunk >= unit.Last {
					t.Fatalf("it names chunk %d, the unit has %d to %d", corrupt.Chunk, unit.First, unit.Last)
				}
			}
			if err := d.Decode(x.table, u, dst, make([]byte, unit.CLen)); !errors.Is(err, ErrCorrupt) {
				t.Errorf("zeros: %v", err)
			}
			if err := d.Decode(x.table, u, dst, good); err != nil {
				t.Errorf("good bytes after bad ones: %v", err)
			}
			if err := d.Decode(x.table, u, dst[1:], good); err == nil || errors.Is(err, ErrCorrupt) {
				t.Errorf("buffer of a wrong size: %v", err)
			}
			// The cache file: a flipped byte, dirty padding, a short read.
			dst[0] ^= 1
			if err := x.table.Verify(u, dst); !errors.Is(err, ErrCorrupt) {
				t.Errorf("verify a flipped byte: %v", err)
			}
			dst[0] ^= 1
			dst[unit.Len-1] ^= 1
			if err := x.table.Verify(u, dst); !errors.Is(err, ErrCorrupt) {
				t.Errorf("verify dirty padding: %v", err)
			}
			if err := x.table.Verify(u, dst[:1]); !errors.Is(err, ErrCorrupt) {
				t.Errorf("verify a short read: %v", err)
			}
		})
	}
}

// TestDeclaredLength: content of another length than the table's is refused, also
// when it is longer by far.
func TestDeclaredLength(t *testing.T) {
	d := NewDecoder()
	defer d.Close()
	big := make([]byte, 64<<20)
	zst, _ := newEncoder(t, CodecZstd).Encode(nil, big)
	for c, src := range map[Codec][]byte{CodecZstd: zst, CodecGzip: gzipped(t, big)} {
		for _, n := range []int{1, 4096, 64<<20 - 1} {
			dst := make([]byte, n)
			allocs := testing.AllocsPerRun(1, func() {
				if err := d.decompress(c, dst, src); err == nil {
					t.Errorf("%v: 64 MiB decoded into %d bytes", c, n)
				}
			})
			if allocs > 100 {
				t.Errorf("%v: %v allocations", c, allocs)
			}
		}
	}
	if err := d.decompress(CodecZstd, make([]byte, 64<<20+1), zst); err == nil {
		t.Error("a frame that is too short was taken")
	}
}

func TestSetDigest(t *testing.T) {
	table, _, _ := open(t, "zstd", 0)
	c := table.Chunk(7)
	if changed, err := table.SetDigest(7, c.Off, c.Len, c.Digest); changed || err != nil {
		t.Errorf("same again: %v %v", changed, err)
	}
	var conflict *ConflictError
	for _, x := range []struct {
		off, n int64
		d      Digest
	}{{c.Off, c.Len, Digest{1}}, {c.Off + 4096, c.Len, c.Digest}, {c.Off, c.Len + 1, c.Digest}} {
		if _, err := table.SetDigest(7, x.off, x.n, x.d); !errors.As(err, &conflict) || conflict.Chunk != 7 {
			t.Errorf("%+v: %v", x, err)
		}
	}
	for _, i := range []int{-1, table.Len()} {
		if _, err := table.SetDigest(i, c.Off, c.Len, c.Digest); !errors.Is(err, ErrCorrupt) {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	if _, err := table.SetDigest(7, c.Off, c.Len, Digest{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("zero digest: %v", err)
	}
	if table.Chunk(7) != c {
		t.Error("a refused digest changed the chunk")
	}
}

func TestLookup(t *testing.T) {
	for _, image := range []string{"zstd", "batch"} {
		table, _, _ := open(t, image, 0)
		for u := range table.Units() {
			x := table.Unit(u)
			for _, off := range []int64{x.Off, x.Off + 1, x.Off + x.Len - 1} {
				if got := table.UnitAt(off); got != u {
					t.Fatalf("%s: offset %d is in unit %d, want %d", image, off, got, u)
				}
			}
			for i := x.First; i < x.Last; i++ {
				if got := table.UnitOf(i); got != u {
					t.Fatalf("%s: chunk %d is in unit %d, want %d", image, i, got, u)
				}
			}
		}
		for _, off := range []int64{table.Size(), table.Size() + 1, 1 << 62} {
			if got := table.UnitAt(off); got != table.Units() {
				t.Errorf("%s: offset %d past the end is in unit %d", image, off, got)
			}
		}
	}
}

// TestCorruptTable damages tables of each kind in many ways: nothing panics, and
// what is taken is a table that keeps the promises of Table.
func TestCorruptTable(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, image := range []string{"zstd", "batch", "layered"} {
		table, blob, e := open(t, image, 0)
		good := table.Marshal()
		for range 3000 {
			bad := slices.Clone(good)
			if r.IntN(2) == 0 { // among the entries, or in the header
				bad[r.Int64N(e.MetaLen)] ^= byte(1 + r.IntN(255))
			} else {
				bad[len(bad)-4096+r.IntN(60)] ^= byte(1 + r.IntN(255))
			}
			if got, err := ParseTable(bad, e); err == nil {
				checkTable(t, got, e)
			} else if !errors.Is(err, ErrCorrupt) && !errors.Is(err, errors.ErrUnsupported) {
				t.Fatalf("%s: %v", image, err)
			}
		}
		for _, n := range []int{0, 1, 4095, 4096, len(good) - 4096, len(good) - 1} {
			if _, err := ParseTable(good[:n], e); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: table of %d bytes: %v", image, n, err)
			}
		}
		// The object: short, and another one.
		for _, p := range [][]byte{blob[:len(blob)-1], make([]byte, len(blob)), nil} {
			if _, err := ReadTable(background, &memory{p: p}, e); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: object of %d bytes: %v", image, len(p), err)
			}
		}
	}
}

// checkTable panics or fails when t does not keep the promises of Table.
func checkTable(t testing.TB, table *Table, e Entry) {
	t.Helper()
	var end int64
	next := 0
	for u := range table.Units() {
		x := table.Unit(u)
		if x.Off != end || x.Len <= 0 || x.Len%4096 != 0 || x.Len > MaxUnitLen || x.First != next || x.Last <= x.First ||
			x.COff < 0 || x.CLen <= 0 || x.CLen > 16<<20 || x.COff+x.CLen > table.entry.DataEnd() {
			t.Fatalf("unit %d: %+v, behind %d", u, x, end)
		}
		for i := x.First; i < x.Last; i++ {
			if c := table.Chunk(i); c.Off < x.Off || c.Len <= 0 || c.Off+c.Len > x.Off+x.Len || c.Len > int64(e.ChunkSize) {
				t.Fatalf("chunk %d: %+v", i, c)
			}
		}
		end, next = x.Off+x.Len, x.Last
	}
	if end != table.Size() || next != table.Len() {
		t.Fatalf("units end at %d and chunk %d, want %d and %d", end, next, table.Size(), table.Len())
	}
}

func TestCorruptTOC(t *testing.T) {
	blob, e := build(t, sample(40_000), CodecZstd, BLAKE3, 4096)
	end := int(e.DataEnd())
	e.MetaCodec, e.MetaOff, e.MetaCLen, e.MetaLen = 0, 0, 0, 0
	toc := len(blob) - int(e.TOCSize)
	for i := toc; i < len(blob); i++ {
		bad := slices.Clone(blob)
		bad[i] ^= 1
		_, err := ReadTable(background, &memory{p: bad}, e)
		_, err2 := ReadDigests(background, &memory{p: bad}, e)
		if !errors.Is(err, ErrCorrupt) || !errors.Is(err2, ErrCorrupt) {
			t.Fatalf("byte %d of the TOC: %v, %v", i-toc, err, err2)
		}
	}
	// What the TOC vouches for: the table, its header, the digests.
	bad := slices.Clone(blob)
	for i := end; i < toc; i++ {
		bad[i] ^= 1
	}
	if _, err := ReadTable(background, &memory{p: bad}, e); !errors.Is(err, ErrCorrupt) {
		t.Errorf("changed table: %v", err)
	}
	if _, err := ReadDigests(background, &memory{p: bad}, e); !errors.Is(err, ErrCorrupt) {
		t.Errorf("changed digests: %v", err)
	}
	e.Features &^= FeatureInlinedChunkDigest
	if _, err := ReadDigests(background, &memory{p: blob}, e); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("digests of a blob without: %v", err)
	}
}

func TestReadErrors(t *testing.T) {
	blob, e := build(t, sample(40_000), CodecZstd, BLAKE3, 4096)
	ctx, cancel := context.WithCancel(background)
	cancel()
	if _, err := ReadTable(ctx, &memory{p: blob}, e); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "blob built") {
		t.Errorf("read table: %v", err)
	}
	if _, err := ReadDigests(ctx, &memory{p: blob}, e); !errors.Is(err, context.Canceled) {
		t.Errorf("read digests: %v", err)
	}
}

func TestChunkDictionary(t *testing.T) {
	blob, e := build(t, sample(40_000), CodecZstd, BLAKE3, 4096)
	e.ChunkCount = 3
	if _, err := ReadTable(background, &memory{p: blob}, e); !errors.Is(err, ErrCorrupt) {
		t.Errorf("wrong count: %v", err)
	}
	e.Features |= FeatureChunkDict
	table, err := ReadTable(background, &memory{p: blob}, e)
	if err != nil || table.Len() != 10 {
		t.Fatalf("a dictionary's blob: %v", err)
	}
	again, err := ParseTable(table.Marshal(), e)
	if err != nil || !slices.Equal(again.chunks, table.chunks) {
		t.Errorf("local form: %v", err)
	}
}

// The test vectors of BLAKE3's authors.
func TestBLAKE3(t *testing.T) {
	p := make([]byte, 102400)
	for i := range p {
		p[i] = byte(i % 251)
	}
	for n, want := range map[int]string{
		0:      "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
		1:      "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
		1023:   "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
		1024:   "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
		1025:   "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
		2048:   "e776b6028c7cd22a4d0ba182a8bf62205d2ef576467e838ed6f2529b85fba24a",
		2049:   "5f4d72f40d7a5f82b15ca2b2e44b1de3c2ef86c426c95c1af0b6879522563030",
		3072:   "b98cb0ff3623be03326b373de6b9095218513e64f1ee2edd2525c7ad1e5cffd2",
		3073:   "7124b49501012f81cc7f11ca069ec9226cecb8a2c850cfe644e327d22d3e1cd3",
		4096:   "015094013f57a5277b59d8475c0501042c0b642e531b0a1c8f58d2163229e969",
		4097:   "9b4052b38f1c5fc8b1f9ff7ac7b27cd242487b3d890d15c96a1c25b8aa0fb995",
		5120:   "9cadc15fed8b5d854562b26a9536d9707cadeda9b143978f319ab34230535833",
		5121:   "628bd2cb2004694adaab7bbd778a25df25c47b9d4155a55f8fbd79f2fe154cff",
		6144:   "3e2e5b74e048f3add6d21faab3f83aa44d3b2278afb83b80b3c35164ebeca205",
		6145:   "f1323a8631446cc50536a9f705ee5cb619424d46887f3c376c695b70e0f0507f",
		7168:   "61da957ec2499a95d6b8023e2b0e604ec7f6b50e80a9678b89d2628e99ada77a",
		7169:   "a003fc7a51754a9b3c7fae0367ab3d782dccf28855a03d435f8cfe74605e7817",
		8192:   "aae792484c8efe4f19e2ca7d371d8c467ffb10748d8a5a1ae579948f718a2a63",
		8193:   "bab6c09cb8ce8cf459261398d2e7aef35700bf488116ceb94a36d0f5f1b7bc3b",
		16384:  "f875d6646de28985646f34ee13be9a576fd515f76b5b0a26bb324735041ddde4",
		31744:  "62b6960e1a44bcc1eb1a611a8d6235b6b4b78f32e7abc4fb4c6cdcce94895c47",
		100000: "d93c23eedaf165a7e0be908ba86f1a7a520d568d2d13cde787c8580c5c72cc54",
	} {
		if got := BLAKE3.Sum(p[:n]).String(); got != want {
			t.Errorf("%d bytes: %s, want %s", n, got, want)
		}
	}
}

// TestEncoderDeterministic: what an encoder did before leaves no trace.
func TestEncoderDeterministic(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 9))
	p := sample(1 << 20)
	for _, x := range []struct {
		c     Codec
		level int
	}{{CodecZstd, 0}, {CodecZstd, 1}, {CodecZstd, 19}, {CodecLZ4, 0}} {
		used, err := NewEncoder(x.c, x.level)
		if err != nil {
			t.Fatal(err)
		}
		defer used.Close()
		for range 30 {
			at := r.IntN(len(p) - 1000)
			q := p[at : at+1+r.IntN(min(256<<10, len(p)-at))]
			got, compressed := used.Encode(nil, q)
			fresh, err := NewEncoder(x.c, x.level)
			if err != nil {
				t.Fatal(err)
			}
			want, compressed2 := fresh.Encode(make([]byte, 10, 1<<20), q)
			fresh.Close()
			if !bytes.Equal(got, want) || compressed != compressed2 {
				t.Fatalf("%v level %d: %d bytes at %d come out different", x.c, x.level, len(q), at)
			}
			if compressed != (len(got) < len(q)) || !compressed && !bytes.Equal(got, q) {
				t.Fatalf("%v: %d bytes became %d, compressed %v", x.c, len(q), len(got), compressed)
			}
		}
		if out, compressed := used.Encode(nil, nil); len(out) != 0 || compressed {
			t.Errorf("%v: nothing became %d bytes", x.c, len(out))
		}
	}
	if _, err := NewEncoder(CodecGzip, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("gzip: %v", err)
	}
}
