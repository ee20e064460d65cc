package localdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/erofsd/erofsd/internal/testenv"
)

const (
	guid1 = "00112233445566778899aabbccddeeff"
	guid2 = "fedcba98765432100123456789abcdef"
)

func read(m image) (table, error) { return readTable(bytes.NewReader(m.p), int64(len(m.p))) }

func TestTable(t *testing.T) {
	for _, sector := range []int64{512, 4096} {
		m := newImage(sector, 200,
			part{basicData, "second", guid2, 60, 69},
			part{linuxData, strings.Repeat("é", 36), guid1, 40, 40},
		)
		want := table{
			{Extent{40 * sector, sector}, strings.Repeat("é", 36), guid1, false},
			{Extent{60 * sector, 10 * sector}, "second", guid2, true},
		}
		got, err := read(m)
		if err != nil || !cmp.Equal(got, want, cmp.AllowUnexported(partition{})) {
			t.Errorf("sectors of %d: error %v\n%s", sector, err, cmp.Diff(want, got, cmp.AllowUnexported(partition{})))
		}
	}
}

// TestCopy: whatever is damaged in one table, the other one serves; when both are, the
// error says why.
func TestCopy(t *testing.T) {
	for _, sector := range []int64{512, 4096} {
		const last = 199
		for name, place := range map[string]func(m image, at int64) *byte{
			"signature": func(m image, at int64) *byte { return &m.head(at)[0] },
			"header":    func(m image, at int64) *byte { return &m.head(at)[40] },
			"checksum":  func(m image, at int64) *byte { return &m.head(at)[16] },
			"entries": func(m image, at int64) *byte {
				return &m.p[int64(binary.LittleEndian.Uint64(m.head(at)[72:]))*sector]
			},
		} {
			m := newImage(sector, last+1, part{linuxData, "p", guid1, 50, 59})
			expect := func(ok bool, damaged string) {
				t.Helper()
				if got, err := read(m); (err == nil) != ok || ok && len(got) != 1 {
					t.Errorf("%s damaged in %s, sectors of %d: error %v, %d partitions", name, damaged, sector, err, len(got))
				}
			}
			first, second := place(m, 1), place(m, last)
			*first ^= 1
			expect(true, "the first table")
			*second ^= 1
			expect(false, "both")
			*first ^= 1
			expect(true, "the copy")
		}
		// The image is on a disk that is larger: the header knows where the copy is.
		m := newImage(sector, 200, part{linuxData, "p", guid1, 50, 59})
		m.p = append(m.p, make([]byte, 100*sector)...)
		m.p[2*sector] ^= 1
		if got, err := read(m); err != nil || len(got) != 1 {
			t.Errorf("entries, larger disk with sectors of %d: error %v", sector, err)
		}
	}
}

func TestRefusedTables(t *testing.T) {
	le := binary.LittleEndian
	two := []part{{linuxData, "a", guid1, 50, 59}, {linuxData, "b", guid2, 60, 69}}
	for name, c := range map[string]struct {
		change func(m image, head []byte)
		want   string
	}{
		"none":                 {func(m image, _ []byte) { clear(m.p) }, "no GUID partition table"},
		"short header":         {func(_ image, h []byte) { le.PutUint32(h[12:], 91) }, "91 bytes"},
		"long header":          {func(_ image, h []byte) { le.PutUint32(h[12:], 1<<31) }, "bytes"},
		"header of elsewhere":  {func(_ image, h []byte) { le.PutUint64(h[24:], 7) }, "sector 7"},
		"small entries":        {func(_ image, h []byte) { le.PutUint32(h[84:], 64) }, "64 bytes"},
		"odd entries":          {func(_ image, h []byte) { le.PutUint32(h[84:], 129) }, "129 bytes"},
		"many entries":         {func(_ image, h []byte) { le.PutUint32(h[80:], 1<<31) }, "entries"},
		"entries too many":     {func(_ image, h []byte) { le.PutUint32(h[80:], maxEntries/128) }, "past the disk"},
		"entries far":          {func(_ image, h []byte) { le.PutUint64(h[72:], 1<<63) }, "past the disk"},
		"entries in header":    {func(_ image, h []byte) { le.PutUint64(h[72:], 1) }, "sector 1"},
		"partition outside":    {func(m image, _ []byte) { le.PutUint64(m.p[1024+40:], 200) }, "to 200 of 200"},
		"partition far":        {func(m image, _ []byte) { le.PutUint64(m.p[1024+40:], 1<<63+5) }, "partition from sector 50"},
		"partition backwards":  {func(m image, _ []byte) { le.PutUint64(m.p[1024+40:], 49) }, "from sector 50 to 49"},
		"partition at zero":    {func(m image, _ []byte) { le.PutUint64(m.p[1024+32:], 0) }, "from sector 0"},
		"partitions overlap":   {func(m image, _ []byte) { le.PutUint64(m.p[1024+40:], 60) }, `"a" and "b" overlap`},
		"partition in another": {func(m image, _ []byte) { le.PutUint64(m.p[1024+40:], 100) }, `"a" and "b" overlap`},
	} {
		m := newImage(512, 200, two...)
		clear(m.head(199)) // no copy
		c.change(m, m.head(1))
		if name != "none" {
			m.seal(1)
		}
		if _, err := read(m); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
}

func TestFind(t *testing.T) {
	digits := strings.Repeat("ab", 16) + guid1
	for name, c := range map[string]struct {
		parts []part
		at    int64 // sector; 0: none
		is    error // when there is none
	}{
		"name and GUID":      {[]part{blobPart(digits, 50, 1)}, 50, nil},
		"older":              {[]part{{basicData, digits[:32], guid2, 50, 59}}, 50, nil},
		"another GUID":       {[]part{{linuxData, digits[:32], guid2, 50, 59}}, 0, fs.ErrNotExist},
		"another name":       {[]part{{linuxData, strings.Repeat("cd", 16), guid1, 50, 59}}, 0, fs.ErrNotExist},
		"shorter name":       {[]part{{basicData, digits[:31], guid1, 50, 59}}, 0, fs.ErrNotExist},
		"no name":            {[]part{{basicData, "", guid1, 50, 59}}, 0, fs.ErrNotExist},
		"among others":       {[]part{{basicData, "EFI system", guid2, 40, 45}, blobPart(digits, 50, 1), {linuxData, digits[:32], guid2, 60, 69}}, 50, nil},
		"twice":              {[]part{blobPart(digits, 50, 1), blobPart(digits, 60, 1)}, 0, nil},
		"twice, also older":  {[]part{blobPart(digits, 50, 1), {basicData, digits[:32], guid2, 60, 69}}, 0, nil},
		"GUID bytes swapped": {[]part{{linuxData, digits[:32], "33221100554477668899aabbccddeeff", 50, 59}}, 0, fs.ErrNotExist},
	} {
		table, err := read(newImage(512, 200, c.parts...))
		if err != nil {
			t.Fatal(err)
		}
		p, err := table.find(digits)
		if (err == nil) != (c.at != 0) || p.Off != c.at*512 || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: found at %d, error %v; want at sector %d", name, p.Off, err, c.at)
		}
	}
}

// TestOther compares our reading of a table with that of util-linux.
func TestOther(t *testing.T) {
	partx := testenv.Tool(t, "partx")
	for _, sector := range []int64{512, 4096} {
		m := newImage(sector, 200,
			part{linuxData, guid1, guid2, 60, 69},
			part{basicData, "another", guid1, 40, 40},
		)
		file := writeDisk(t, m.p)
		out, err := exec.Command(partx, "--raw", "--noheadings", "--output", "START,SECTORS,NAME,UUID",
			"--sector-size", strconv.FormatInt(sector, 10), file).CombinedOutput()
		if err != nil {
			t.Fatalf("partx: %v: %s", err, out)
		}
		got, err := read(m)
		if err != nil {
			t.Fatal(err)
		}
		var ours []string
		for _, p := range got {
			ours = append(ours, fmt.Sprint(p.Off/512, p.Size/512, " ", p.name, " ", p.guid))
		}
		theirs := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(out), "-", "")), "\n")
		slices.Sort(ours)
		slices.Sort(theirs)
		if diff := cmp.Diff(theirs, ours); diff != "" {
			t.Errorf("sectors of %d, partx against us:\n%s", sector, diff)
		}
	}
}

// FuzzTable: no disk makes us panic or take a partition that is not on it or overlaps.
func FuzzTable(f *testing.F) {
	m := newImage(512, 80, part{linuxData, "a", guid1, 40, 41}, part{linuxData, "b", guid2, 42, 42})
	f.Add(m.head(1)[:headerSize], m.p[1024:1024+4*entrySize], true)
	f.Add(m.head(1)[:headerSize], m.p[1024:1024+4*entrySize], false)
	f.Fuzz(func(t *testing.T, head, entries []byte, seal bool) {
		m := newImage(512, 80)
		clear(m.head(79))
		copy(m.head(1), head)
		copy(m.p[1024:], entries)
		if seal {
			m.seal(1)
		}
		got, err := read(m)
		if err != nil {
			return
		}
		end := int64(512)
		for _, p := range got {
			if p.Off < end || p.Size <= 0 || p.Off+p.Size > int64(len(m.p)) {
				t.Fatalf("partition of %d bytes at %d after one that ends at %d, on a disk of %d", p.Size, p.Off, end, len(m.p))
			}
			end = p.Off + p.Size
		}
	})
}
