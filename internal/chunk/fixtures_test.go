package chunk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// memory is a ReaderAt that counts reads.
type memory struct {
	p     []byte
	reads int
}

func (m *memory) Size() int64 { return int64(len(m.p)) }

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	m.reads++
	if off < 0 || off+int64(len(p)) > int64(len(m.p)) {
		return io.ErrUnexpectedEOF
	}
	copy(p, m.p[off:])
	return ctx.Err()
}

// row is an element of the bootstrap's chunk table (rafs-v6-format 1.7).
type row struct {
	digest     Digest
	blob, flag uint32
	clen, len  uint32
	coff, off  uint64
	index      uint32
}

// bootstrap finds the raw blob table entries and the chunk table of a bootstrap by
// the offsets of rafs-v6-format 1.3.
func bootstrap(t testing.TB, image string) (entries [][]byte, rows []row) {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), image, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	x := p[1152:]
	for b := p[u64(x[8:]):][:u32(x[16:])]; len(b) > 0; b = b[entrySize:] {
		entries = append(entries, b[:entrySize:entrySize])
	}
	for c := p[u64(x[24:]):][:u64(x[32:])]; len(c) > 0; c = c[80:] {
		rows = append(rows, row{
			Digest(c[:32]), u32(c[32:]), u32(c[36:]), u32(c[40:]), u32(c[44:]), u64(c[48:]), u64(c[56:]), u32(c[72:]),
		})
	}
	return entries, rows
}

// open reads a blob of a fixture and its table, with all the digests that the
// bootstrap has.
func open(t testing.TB, image string, index int) (*Table, []byte, Entry) {
	t.Helper()
	entries, rows := bootstrap(t, image)
	e, err := ParseEntry(entries[index])
	if err != nil {
		t.Fatal(err)
	}
	blob, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), image, "blobs", e.ID))
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{p: blob}
	table, err := ReadTable(context.Background(), m, e)
	if err != nil {
		t.Fatal(err)
	}
	if m.reads != 1 {
		t.Errorf("ReadTable took %d reads of a blob whose entry says where the table is", m.reads)
	}
	for _, r := range rows {
		if int(r.blob) != index {
			continue
		}
		changed, err := table.SetDigest(int(r.index), int64(r.off), int64(r.len), r.digest)
		if err != nil || !changed {
			t.Fatalf("set digest of chunk %d: changed %v, %v", r.index, changed, err)
		}
	}
	return table, blob, e
}

// decodeAll decodes every unit of t out of blob, with one read each, and returns
// the cache file.
func decodeAll(t testing.TB, table *Table, blob []byte) []byte {
	t.Helper()
	d := NewDecoder()
	defer d.Close()
	cache := bytes.Repeat([]byte{0xaa}, int(table.Size()))
	var end int64
	for u := range table.Units() {
		x := table.Unit(u)
		if x.Off != end || x.Len%4096 != 0 {
			t.Fatalf("unit %d lies at %d+%d, want a multiple of 4096 at %d", u, x.Off, x.Len, end)
		}
		end += x.Len
		if err := d.Decode(table, u, cache[x.Off:end], blob[x.COff:x.COff+x.CLen]); err != nil {
			t.Fatalf("unit %d: %v", u, err)
		}
		if err := table.Verify(u, cache[x.Off:end]); err != nil {
			t.Fatalf("unit %d: %v", u, err)
		}
	}
	if end != table.Size() {
		t.Fatalf("units end at %d, want %d", end, table.Size())
	}
	return cache
}

var fixtureImages = []string{"zstd", "lz4", "none", "sha256-64k", "batch", "layered"}

// TestFixtures decodes every chunk of every image that nydus-image made, and
// compares it with the bootstrap's chunk table, without the help of Table.
func TestFixtures(t *testing.T) {
	for _, image := range fixtureImages {
		t.Run(image, func(t *testing.T) {
			entries, rows := bootstrap(t, image)
			checked := 0
			for i, raw := range entries {
				table, blob, e := open(t, image, i)
				if got := e.Marshal(); !bytes.Equal(got[:], raw) {
					t.Errorf("blob %d: entry is not the same when written again", i)
				}
				if table.Len() != int(e.ChunkCount) || table.Size() != e.Size || e.Index != uint32(i) {
					t.Errorf("blob %d: %d chunks of %d bytes, index %d", i, table.Len(), table.Size(), e.Index)
				}
				cache := decodeAll(t, table, blob)
				for _, r := range rows {
					if int(r.blob) != i {
						continue
					}
					p := cache[r.off:][:r.len]
					if got := e.Digester.Sum(p); got != r.digest {
						t.Fatalf("blob %d chunk %d: digest %v, want %v", i, r.index, got, r.digest)
					}
					if c := table.Chunk(int(r.index)); r.clen != 0 && (c.COff != int64(r.coff) || c.CLen != int64(r.clen) || c.Compressed != (r.flag&1 != 0)) {
						t.Fatalf("blob %d chunk %d: %+v, the image says %+v", i, r.index, c, r)
					}
					checked++
				}
			}
			if checked != len(rows) || checked == 0 {
				t.Errorf("%d chunks of %d checked", checked, len(rows))
			}
		})
	}
}

// TestUnreferencedChunks decodes a layer that the merged image uses only parts of:
// what has no digest is zero.
func TestUnreferencedChunks(t *testing.T) {
	found := 0
	for i := range 3 {
		table, blob, _ := open(t, "layered", i)
		cache := decodeAll(t, table, blob)
		for u := range table.Units() {
			if table.Needed(u) {
				continue
			}
			found++
			if x := table.Unit(u); !zero(cache[x.Off : x.Off+x.Len]) {
				t.Errorf("blob %d unit %d has no digest and is not zero", i, u)
			}
		}
	}
	if found == 0 {
		t.Error("no such chunk in the image")
	}
	// A batch with one known chunk: its neighbours stay zero, and learning their
	// digest later makes Verify ask for the unit again.
	table, blob, _ := open(t, "batch", 0)
	u := table.UnitOf(20)
	x := table.Unit(u)
	if x.First == 20 || x.Last <= 21 {
		t.Fatalf("unit %d has chunks %d to %d, want 20 in its middle", u, x.First, x.Last)
	}
	digest := table.digests[21]
	clear(table.digests[x.First:20])
	clear(table.digests[21:x.Last])
	d := NewDecoder()
	defer d.Close()
	dst := bytes.Repeat([]byte{0xaa}, int(x.Len))
	if err := d.Decode(table, u, dst, blob[x.COff:x.COff+x.CLen]); err != nil {
		t.Fatal(err)
	}
	c := table.Chunk(20)
	at := c.Off - x.Off
	if got := table.Digester().Sum(dst[at : at+c.Len]); got != c.Digest {
		t.Errorf("chunk 20 has digest %v, want %v", got, c.Digest)
	}
	if !zero(dst[:at]) || !zero(dst[at+c.Len:]) {
		t.Error("chunks without a digest are not zero")
	}
	if err := table.Verify(u, dst); err != nil {
		t.Error(err)
	}
	other := table.Chunk(21)
	if changed, err := table.SetDigest(21, other.Off, other.Len, digest); !changed || err != nil {
		t.Errorf("set digest: %v %v", changed, err)
	}
	if err := table.Verify(u, dst); !errors.Is(err, ErrCorrupt) {
		t.Errorf("verify after a digest became known: %v", err)
	}
}

// TestLocalForm writes each table in its local form and reads it again.
func TestLocalForm(t *testing.T) {
	for _, image := range fixtureImages {
		table, blob, e := open(t, image, 0)
		p := table.Marshal()
		again, err := ParseTable(p, e)
		if err != nil {
			t.Fatalf("%s: %v", image, err)
		}
		if again.Len() != table.Len() || again.Units() != table.Units() || again.Size() != table.Size() {
			t.Fatalf("%s: %d chunks, %d units, %d bytes", image, again.Len(), again.Units(), again.Size())
		}
		for i := range table.Len() {
			if c := table.Chunk(i); again.Chunk(i).Known {
				t.Fatalf("%s: the local form has digests", image)
			} else if _, err := again.SetDigest(i, c.Off, c.Len, c.Digest); c.Known && err != nil {
				t.Fatal(err)
			}
			if got, want := again.Chunk(i), table.Chunk(i); got != want {
				t.Fatalf("%s: chunk %d: %+v, want %+v", image, i, got, want)
			}
		}
		decodeAll(t, again, blob)
		// An entry that leaves the place to the TOC takes it from the header.
		if image == "zstd" {
			e.Features |= FeatureTOC
			e.MetaCodec, e.MetaOff, e.MetaCLen, e.MetaLen = 0, 0, 0, 0
			if again, err = ParseTable(p, e); err != nil || again.entry.MetaOff != table.entry.MetaOff {
				t.Errorf("parse with an entry without offsets: %v", err)
			}
		}
	}
}

// TestLocalFormOfNydus compares the local form with the array as it is in a blob
// that stores it plainly.
func TestLocalFormOfNydus(t *testing.T) {
	table, blob, e := open(t, "none", 0)
	want := append([]byte(nil), blob[e.MetaOff:e.MetaOff+e.MetaLen]...)
	want = append(want, make([]byte, roundUp(e.MetaLen)-e.MetaLen)...)
	want = append(want, blob[e.MetaOff+e.MetaCLen:][:metaHeaderSize]...)
	if !bytes.Equal(table.Marshal(), want) {
		t.Error("the local form differs from nydus's bytes")
	}
}

func TestRefused(t *testing.T) {
	entries, _ := bootstrap(t, "zran")
	for i, raw := range entries {
		_, err := ParseEntry(raw)
		if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "zran") {
			t.Errorf("zran blob %d: %v", i, err)
		}
	}
	good, _ := bootstrap(t, "zstd")
	for _, x := range []struct {
		name string
		edit func(e *Entry)
		want string // "" for ErrCorrupt
	}{
		{"encrypted", func(e *Entry) { e.Features |= FeatureEncrypted }, "encryption"},
		{"cipher", func(e *Entry) { e.Cipher = 1 }, "encryption"},
		{"tarfs", func(e *Entry) { e.Features |= FeatureTarfs }, "tarfs"},
		{"external", func(e *Entry) { e.Features |= FeatureExternal }, "external"},
		{"unknown feature", func(e *Entry) { e.Features |= 0x4000 }, "0x4000"},
		{"internal feature", func(e *Entry) { e.Features |= 1 << 31 }, "0x80000000"},
		{"unaligned", func(e *Entry) { e.Features &^= FeatureAligned }, "aligned"},
		{"codec", func(e *Entry) { e.Codec = 4 }, "codec"},
		{"stargz", func(e *Entry) { e.Codec = CodecGzip }, "stargz"},
		{"digester", func(e *Entry) { e.Digester = 2 }, "digester"},
		{"no table", func(e *Entry) { e.MetaOff, e.MetaCLen, e.MetaLen = 0, 0, 0 }, "TOC"},
		{"path as id", func(e *Entry) { e.ID = "../../etc/passwd" }, ""},
		{"no id", func(e *Entry) { e.ID = "" }, ""},
		{"chunk size", func(e *Entry) { e.ChunkSize = 12345 }, ""},
		{"no chunks", func(e *Entry) { e.ChunkCount = 0 }, ""},
		{"too many chunks", func(e *Entry) { e.ChunkCount = 1<<24 + 1 }, ""},
		{"chunks without room", func(e *Entry) { e.Size = 4096 }, ""},
		{"size", func(e *Entry) { e.Size++ }, ""},
		{"negative size", func(e *Entry) { e.Size = -4096 }, ""},
		{"batch v1", func(e *Entry) { e.Features |= FeatureBatch }, ""},
		{"table length", func(e *Entry) { e.MetaLen += 16 }, ""},
		{"huge table", func(e *Entry) { e.MetaLen, e.MetaCLen = 1<<40, 1<<40 }, ""},
		{"table off", func(e *Entry) { e.MetaOff = -1 }, ""},
		{"table stored larger", func(e *Entry) { e.MetaCLen = e.MetaLen + 1 }, ""},
		{"bomb", func(e *Entry) { e.MetaCLen = 1 }, ""},
		{"toc size", func(e *Entry) { e.TOCSize = 8192 }, ""},
	} {
		e, err := ParseEntry(good[0])
		if err != nil {
			t.Fatal(err)
		}
		x.edit(&e)
		p := e.Marshal()
		_, err = ParseEntry(p[:])
		if want := cmpError(x.want); !errors.Is(err, want) || !strings.Contains(fmt.Sprint(err), x.want) {
			t.Errorf("%s: error %v, want %v with %q", x.name, err, want, x.want)
		}
	}
	if _, err := ParseEntry(good[0][:255]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("short entry: %v", err)
	}
}

func cmpError(unsupported string) error {
	if unsupported == "" {
		return ErrCorrupt
	}
	return errors.ErrUnsupported
}
