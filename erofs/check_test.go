package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/erofsd/erofsd/internal/testenv"
)

func checkImage(img []byte, l Limits) (*Summary, error) {
	return Check(context.Background(), bytes.NewReader(img), int64(len(img)), l)
}

func openImage(t testing.TB, img []byte) *Image {
	t.Helper()
	m, err := Open(bytes.NewReader(img), int64(len(img)))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// describe returns all that the kernel would see of an image, in one comparable
// string: every path with its attributes and where its data lie.
func describe(img []byte) (string, error) {
	m, err := Open(bytes.NewReader(img), int64(len(img)))
	if err != nil {
		return "", err
	}
	var s strings.Builder
	for _, d := range m.devices {
		fmt.Fprintf(&s, "device of %d blocks\n", d.Blocks)
	}
	err = m.Walk(func(path string, n Inode) error {
		fmt.Fprintf(&s, "%q %d %o %d %d %d %d %d %d %d.%d", path, n.NID, n.Mode, n.UID, n.GID, n.Nlink, n.Size, n.Major, n.Minor, n.Sec, n.Nsec)
		list, err := m.Xattrs(n)
		if err != nil {
			return err
		}
		fmt.Fprintf(&s, " %q", list)
		switch n.Mode & typeMask {
		case typeReg:
			for e, err := range m.Extents(n) {
				if err != nil {
					return err
				}
				fmt.Fprintf(&s, " %v", e)
			}
		case typeLnk:
			target, err := m.Readlink(n)
			if err != nil {
				return err
			}
			fmt.Fprintf(&s, " %q", target)
		}
		s.WriteByte('\n')
		return nil
	})
	return s.String(), err
}

// small is a tree of a few blocks with one of everything.
func small() *model {
	m := newModel(4096)
	k, other := m.blob(), m.blob()
	m.put("dir/file", m.file(k, bytes.Repeat([]byte("a"), 10_000)))
	x := m.put("dir/xattr", m.file(other, []byte("b")))
	x.Xattrs = []Xattr{{"security.test", []byte("v")}, {"user.a", bytes.Repeat([]byte("w"), 30)}}
	m.put("dir/mixed", &Node{Mode: typeReg | 0o600, Size: 4097, Chunks: []ChunkRef{m.chunk(other, make([]byte, 4096)), m.chunk(k, []byte("c"))}})
	m.put("dir/sub/deeper/link", &Node{Mode: typeLnk | 0o777, Target: "target"})
	m.put("dir/sub/hard", x)
	m.put("char", &Node{Mode: typeChr | 0o600, Major: 1, Minor: 3})
	m.put("empty", &Node{Mode: typeReg | 0o600})
	m.put("fifo", &Node{Mode: typeFifo | 0o600})
	m.put("long", &Node{Mode: typeLnk | 0o777, Target: strings.Repeat("l", 4095)})
	for i := range 16 { // a block that is nearly full, so not behind the inode
		m.put(fmt.Sprintf("many/%03d%s", i, strings.Repeat("n", 237)), &Node{Mode: typeReg})
	}
	return m
}

func TestCheckWritten(t *testing.T) {
	models := map[string]*model{
		"everything 4k": everything(4096), "everything 64k": everything(65536),
		"empty": newModel(4096), "small": small(), "flat": flatTree(3000),
	}
	for seed := range uint64(30) {
		models[fmt.Sprintf("random %d", seed)] = randomTree(seed, 200)
	}
	for name, m := range models {
		for _, shared := range []bool{false, true} {
			m.o.SharedXattrs = shared
			img := m.write(t)
			sum, err := checkImage(img, Limits{})
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if want := names(m.root); sum.Entries != want {
				t.Errorf("%s: %d entries, want %d", name, sum.Entries, want)
			}
		}
	}
}

// names counts what is below n.
func names(n *Node) int64 {
	count := int64(len(n.Children))
	for _, c := range n.Children {
		count += names(c)
	}
	return count
}

// A patcher changes a small image.
type patcher struct {
	t   *testing.T
	m   *Image
	img []byte
}

func (p *patcher) inode(path string) (Inode, []byte) {
	p.t.Helper()
	n, err := p.m.Lookup(path)
	if err != nil {
		p.t.Fatal(err)
	}
	return n, p.img[n.off:]
}

// dirent returns the entry of name in directory dir.
func (p *patcher) dirent(dir, name string) []byte {
	p.t.Helper()
	n, _ := p.inode(dir)
	base := p.img[n.tail():]
	if at, end, _ := p.m.flat(n); end > 0 {
		base = p.img[at:]
	}
	i := 0
	for e, err := range p.m.ReadDir(n) {
		if err != nil {
			p.t.Fatal(err)
		}
		if e.Name == name {
			return base[i*direntSize:]
		}
		i++
	}
	p.t.Fatalf("no %q in %q", name, dir)
	return nil
}

func (p *patcher) index(path string, i int) []byte {
	p.t.Helper()
	n, _ := p.inode(path)
	f, err := p.m.chunkFormat(n)
	if err != nil {
		p.t.Fatal(err)
	}
	return p.img[f.at+int64(i)*f.width:]
}

func (p *patcher) chunk(i int) []byte {
	return p.img[p.m.rafs.ChunkTable+int64(i)*chunkInfoSize:]
}

func (p *patcher) name(dir, old, now string) {
	p.t.Helper()
	n, _ := p.inode(dir)
	area := p.img[n.tail():][:n.Size]
	i := bytes.Index(area, []byte(old))
	if i < 0 {
		p.t.Fatalf("no name %q in %q", old, dir)
	}
	copy(area[i:], now)
}

func TestCheckRefuses(t *testing.T) {
	sb := func(off int, b ...byte) func(*patcher) {
		return func(p *patcher) { copy(p.img[superOffset+off:], b) }
	}
	ext := func(off int, b ...byte) func(*patcher) {
		return func(p *patcher) { copy(p.img[extSuper+off:], b) }
	}
	dev := func(off int, b ...byte) func(*patcher) {
		return func(p *patcher) { copy(p.img[deviceTable+off:], b) }
	}
	blob := func(off int, b ...byte) func(*patcher) {
		return func(p *patcher) { copy(p.img[p.m.rafs.BlobTable+int64(off):], b) }
	}
	ino := func(path string, off int, b ...byte) func(*patcher) {
		return func(p *patcher) { _, i := p.inode(path); copy(i[off:], b) }
	}
	for _, c := range []struct {
		name, want string
		patch      func(*patcher)
	}{
		{"magic", "magic", sb(0, 0)},
		{"rafs v5", "RAFS v5", func(p *patcher) { le.PutUint32(p.img, rafsV5Magic) }},
		{"block size", "block size", sb(12, 16)},
		{"small blocks", "must be 4096", sb(12, 9)},
		{"compression", "incompatible features 0x2", sb(80, 0xe)},
		{"no chunk feature", "exactly 0xc", sb(80, 8)},
		{"zero padding in rafs", "exactly 0xc", sb(80, 0xd)},
		{"48 bit", "incompatible", sb(80, 0x8c)},
		{"lz4 distance", "compression", sb(84, 1)},
		{"xattr prefixes", "prefixes", sb(91, 1)},
		{"dir blocks", "directory blocks", sb(90, 1)},
		{"packed inode", "packed", sb(96, 1)},
		{"reserved", "leaves zero", sb(110, 1)},
		{"checksum bit", "checksum", sb(8, 1)},
		{"checksum", "leaves zero", sb(4, 1)},
		{"not rafs", "unsupported", sb(11, 0)},
		{"slots", "", sb(88, 12)},
		{"devices", "blob table", sb(86, 1)},
		{"many devices", "outside", sb(86, 0xff, 0xff)},
		{"meta", "behind the end", sb(40, 0, 0, 0, 1)},
		{"root", "outside", sb(14, 0xff, 0xff)},
		{"root nowhere", "", sb(14, 0)},
		{"blob table offset", "blob table", ext(8, 1)},
		{"blob table far", "outside", ext(8, 0, 0, 0, 0, 1)},
		{"blob table negative", "outside", ext(15, 0x80)},
		{"chunk size", "chunk size", ext(20, 1)},
		{"chunk size small", "chunk size", ext(20, 0, 8, 0, 0)},
		{"chunk size other", "blob 0: chunk size", ext(20, 0, 0x20, 0, 0)},
		{"chunk table offset", "chunk table", ext(24, 8)},
		{"chunk table over all", "overlap", ext(24, 0, 0x10)},
		{"chunk table long", "outside", ext(32, 0, 0, 0x50, 0)},
		{"chunk table huge", "multiple", ext(38, 1)},
		{"chunk table odd", "multiple", ext(32, 1)},
		{"no chunk table", "not in the chunk table", ext(32, 0, 0)},
		{"two codecs", "one compression", ext(0, 0x83)},
		{"no digest", "one compression and one digest", ext(0, 0x80)},
		{"tarfs", "tarfs", ext(1, 0x03)},
		{"encrypted", "encrypted", ext(3, 2)},
		{"unknown flags", "flags", ext(1, 0xf0)},
		{"tag", "id", dev(0, 'x')},
		{"unsafe tag", "plain name", dev(0, '.', '.', '/')},
		{"device short", "cache file", dev(64, 1)},
		{"device empty", "size is not given", dev(64, 0)},
		{"device mapped inside", "inside of the image", dev(68, 1, 0, 0, 0)},
		{"device mapped high", "behind the last one", dev(68, 0xff, 0xff, 0xff, 0xff)},
		{"device hi", "32 bits", dev(72, 1)},
		{"devices over each other", "over each other", func(p *patcher) { copy(p.img[deviceTable+68:], p.img[deviceTable+deviceSize+68:][:4]) }},
		{"same tag", "second time", func(p *patcher) { copy(p.img[deviceTable:][:64], p.img[deviceTable+deviceSize:]) }},
		{"blob id", "id", blob(0, 'x')},
		{"blob index", "index", blob(64, 1)},
		{"blob without chunks", "0 chunks", blob(72, 0)},
		{"blob size", "cache file", blob(96, 1)},
		{"chunk blob", "in blob 9", func(p *patcher) { p.chunk(0)[32] = 9 }},
		{"chunk long", "bytes: must have", func(p *patcher) { p.chunk(0)[46] = 1 }},
		{"chunk empty", "bytes: must have", func(p *patcher) { clear(p.chunk(0)[44:48]) }},
		{"chunk odd", "is at", func(p *patcher) { p.chunk(0)[56] = 1 }},
		{"chunk far", "is at", func(p *patcher) { p.chunk(0)[59] = 1 }},
		{"chunk number", "is number", func(p *patcher) { p.chunk(0)[73] = 1 }},
		{"chunk stored far", "stored", func(p *patcher) { p.chunk(0)[55] = 1 }},
		{"chunk twice", "differ", func(p *patcher) {
			copy(p.chunk(1)[32:36], p.chunk(0)[32:36])
			copy(p.chunk(1)[72:76], p.chunk(0)[72:76])
		}},
		{"format", "unknown bits", ino("empty", 1, 0x10)},
		{"layout", "compressed", ino("empty", 0, 3)},
		{"plain file", "must be chunk-based", ino("dir/file", 0, 1)},
		{"chunked directory", "chunk-based", ino("dir", 0, 9)},
		{"mode", "no known type", ino("empty", 5, 0x30)},
		{"negative size", "negative", ino("empty", 15, 0x80)},
		{"huge file", "index ends behind", ino("empty", 12, 1)},
		{"no links", "link count 0", ino("empty", 44, 0)},
		{"few links", "more names", ino("dir/xattr", 44, 1)},
		{"nanoseconds", "ns", ino("empty", 40, 0xff, 0xff, 0xff, 0xff)},
		{"type", "entry of type", ino("fifo", 5, 0xc0)},
		{"short link", "target of 0 bytes", ino("dir/sub/deeper/link", 8, 0)},
		{"long link", "target of 4096", ino("long", 8, 0, 0x10)},
		{"NUL in link", "NUL", func(p *patcher) { n, i := p.inode("dir/sub/deeper/link"); i[n.headLen+2] = 0 }},
		{"link target far", "outside", func(p *patcher) { n, i := p.inode("long"); _ = n; i[18] = 0xff }},
		{"inline crosses", "cross a block", ino("dir/sub/deeper/link", 8, 0xfe, 0x0f)},
		{"xattrs long", "", ino("dir/xattr", 2, 0xff, 0xff)},
		{"xattr prefix", "prefix", ino("dir/xattr", inodeSize+12+1, 9)},
		{"xattr name", "name", ino("dir/xattr", inodeSize+12, 0)},
		{"xattr name long", "", ino("dir/xattr", inodeSize+12, 0xff)},
		{"xattr value", "entry of", ino("dir/xattr", inodeSize+12+2, 0, 0x80)},
		{"xattrs shared", "shared", ino("dir/xattr", inodeSize+4, 200)},
		{"xattr shared far", "outside", func(p *patcher) {
			_, i := p.inode("dir/xattr")
			i[inodeSize+4] = 1
			copy(i[inodeSize+12:], "\xff\xff\xff\xff")
		}},
		{"kernel chunk large", "the kernel", ino("dir/mixed", 16, 0x21)},
		{"kernel chunk in step", "the kernel would read", ino("dir/file", 16, 0x21)},
		{"kernel chunk format", "chunk format", ino("dir/file", 16, 0x60)},
		{"kernel block map", "8-byte", ino("dir/file", 16, 0)},
		{"no device", "no blob", func(p *patcher) { p.index("dir/file", 0)[2] = 0 }},
		{"device number", "device 3 of 2", func(p *patcher) { p.index("dir/mixed", 0)[2] = 3 }},
		{"hole", "no blob", func(p *patcher) { copy(p.index("dir/mixed", 0)[4:], "\xff\xff\xff\xff") }},
		{"block", "outside of device", func(p *patcher) { p.index("dir/mixed", 0)[6] = 1 }},
		{"other block", "in the chunk table", func(p *patcher) { p.index("dir/mixed", 1)[4]-- }},
		{"other chunk", "chunk", func(p *patcher) { p.index("dir/mixed", 0)[0]++ }},
		{"no such chunk", "not in the chunk table", func(p *patcher) { p.index("dir/mixed", 0)[3] = 1 }},
		{"kernel sees another place", "the kernel does not look", func(p *patcher) { p.index("dir/file", 1)[4]++ }},
		{"file size", "in the chunk table", ino("dir/file", 8, 0x11)},
		{"dot", `"."`, func(p *patcher) { le.PutUint64(p.dirent("dir", "."), p.m.Root()) }},
		{"dotdot", `".."`, func(p *patcher) { le.PutUint64(p.dirent("dir/sub", ".."), p.m.Root()) }},
		{"dot type", `"."`, func(p *patcher) { p.dirent("dir", ".")[10] = 1 }},
		{"no dot", "reached twice", func(p *patcher) { p.name("dir/sub/deeper", "...", "-..") }},
		{"cycle", "", func(p *patcher) { n, _ := p.inode("dir"); le.PutUint64(p.dirent("dir/sub", "deeper"), n.NID) }},
		{"cycle to the root", "reached twice", func(p *patcher) { le.PutUint64(p.dirent("dir/sub", "deeper"), p.m.Root()) }},
		{"name with slash", "slash", func(p *patcher) { p.name("dir", "file", "fi/e") }},
		{"name with NUL", "NUL", func(p *patcher) { p.name("dir", "file", "fi\x00e") }},
		{"order", "not their order", func(p *patcher) { p.name("dir", "file", "zile") }},
		{"same name", "not their order", func(p *patcher) { p.name("dir/sub/deeper", "..", ".."); p.name("dir", "mixed", "xattr") }},
		{"first name", "first name", func(p *patcher) { p.dirent("dir", ".")[8]++ }},
		{"name offset", "name from", func(p *patcher) { p.dirent("dir", "file")[9] = 0xff }},
		{"name offset back", "name from", func(p *patcher) { p.dirent("dir", "file")[8] = 0 }},
		{"nid", "outside", func(p *patcher) { p.dirent("dir", "file")[5] = 1 }},
		{"inode in inode", "", func(p *patcher) { le.PutUint64(p.dirent("dir", "file"), p.m.Root()+1) }},
		{"directory size", "", ino("dir", 14, 1)},
		{"directory empty", "lacks", ino("dir", 8, 0, 0)},
		{"byte behind name", "behind the last name", func(p *patcher) {
			n, _ := p.inode("many")
			at, end, _ := p.m.flat(n)
			if end != n.Size || end%blockSize == 0 {
				p.t.Fatal("the directory does not end inside a block")
			}
			p.img[at+end] = 'x'
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := small().write(t)
			c.patch(&patcher{t, openImage(t, bytes.Clone(img)), img})
			_, err := checkImage(img, Limits{})
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q in it", err, c.want)
			}
			if f := (*FormatError)(nil); !errors.As(err, &f) && !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("%v is no defect", err)
			}
			sum, err := checkImage(img, Limits{Defects: 100})
			if err != nil || len(sum.Defects) == 0 {
				t.Errorf("with a list: %q, %v", sum.Defects, err)
			}
		})
	}
}

func TestCheckDefects(t *testing.T) {
	img := small().write(t)
	p := &patcher{t, openImage(t, bytes.Clone(img)), img}
	for _, path := range []string{"empty", "fifo", "dir/file"} {
		_, i := p.inode(path)
		clear(i[44:48])
	}
	sum, err := checkImage(img, Limits{Defects: 100})
	if err != nil || len(sum.Defects) != 3 || sum.Full {
		t.Errorf("%q, full %v, %v, want three", sum.Defects, sum.Full, err)
	}
	sum, err = checkImage(img, Limits{Defects: 2})
	if err != nil || len(sum.Defects) != 2 || !sum.Full {
		t.Errorf("%q, full %v, %v, want two and no more", sum.Defects, sum.Full, err)
	}
}

func TestCheckLimits(t *testing.T) {
	img := everything(4096).write(t)
	for name, l := range map[string]Limits{"size": {Size: 4096}, "entries": {Entries: 100}, "memory": {Memory: 1000}} {
		if _, err := checkImage(img, l); err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			t.Log(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Check(ctx, bytes.NewReader(img), int64(len(img)), Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	bad := iotest.ErrReader(io.ErrNoProgress)
	r := io.NewSectionReader(readerAt{bad}, 0, 1<<20)
	if sum, err := Check(context.Background(), r, 1<<20, Limits{Defects: 9}); !errors.Is(err, io.ErrNoProgress) || len(sum.Defects) > 0 {
		t.Errorf("broken reader: %v, %q", err, sum.Defects)
	}
	if _, err := Check(context.Background(), bytes.NewReader(img[:8192]), int64(len(img)), Limits{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("file shorter than said: %v", err)
	}
}

type readerAt struct{ io.Reader }

func (r readerAt) ReadAt(p []byte, _ int64) (int, error) { return r.Read(p) }

func TestCheckDepth(t *testing.T) {
	for _, depth := range []int{maxDepth, maxDepth + 1} {
		m := newModel(4096)
		m.root = nest(depth)
		img := m.write(t)
		_, err := checkImage(img, Limits{})
		_, derr := describe(img)
		if ok := depth <= maxDepth; (err == nil) != ok || (derr == nil) != ok {
			t.Errorf("%d deep: %v, %v", depth, err, derr)
		}
	}
}

func nest(depth int) *Node {
	n := dir(0o755)
	for range depth {
		up := dir(0o755)
		up.Children["d"] = n
		n = up
	}
	return n
}

// TestCheckFast: a mount has 20 ms at the 99th percentile. The bound is wide
// for busy machines and the race detector.
func TestCheckFast(t *testing.T) {
	img := flatTree(13_000).write(t)
	best := time.Hour
	for range 10 {
		start := time.Now()
		if _, err := checkImage(img, Limits{}); err != nil {
			t.Fatal(err)
		}
		best = min(best, time.Since(start))
	}
	t.Logf("13000 files in %v", best)
	if best > 200*time.Millisecond {
		t.Errorf("13000 files in %v, want less than 15 ms on an idle machine", best)
	}
}

func BenchmarkCheck(b *testing.B) {
	img := flatTree(13_000).write(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := checkImage(img, Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}

func fixtureImage(t testing.TB, name string) []byte {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), name, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestCheckTruncated: no part of a bootstrap passes for a whole one.
func TestCheckTruncated(t *testing.T) {
	t.Parallel()
	images := map[string][]byte{"small": small().write(t), "zstd": fixtureImage(t, "zstd")}
	for name, img := range images {
		for n := 0; n < len(img); n++ {
			if n > 16<<10 && name != "small" && n%509 != 0 && n%blockSize != 0 {
				continue
			}
			if _, err := checkImage(img[:n], Limits{}); err == nil {
				t.Errorf("%s: %d of %d bytes are accepted", name, n, len(img))
			}
			if _, err := describe(img[:n]); err == nil && n < blockSize {
				t.Errorf("%s: %d of %d bytes can be read", name, n, len(img))
			}
		}
	}
}

// TestCheckFlipped changes each byte of the first 8 KiB in turn. What Check still
// accepts must mean the same as before.
func TestCheckFlipped(t *testing.T) {
	t.Parallel()
	img := fixtureImage(t, "zstd")
	want, err := describe(img)
	if err != nil {
		t.Fatal(err)
	}
	m := openImage(t, img)
	tables := func(off int) bool {
		return off >= superOffset && off < deviceTable+deviceSize*len(m.devices) ||
			int64(off) >= m.rafs.BlobTable && int64(off) < m.rafs.BlobTable+m.rafs.BlobTableLen+m.rafs.PrefetchLen
	}
	var accepted []int
	for off := range 8 << 10 {
		for _, mask := range []byte{0xff, 0x01} {
			if !tables(off) && (mask != 0xff || off%32 != 0 && off > 8) {
				continue // zeros between the tables
			}
			img[off] ^= mask
			if _, err := checkImage(img, Limits{}); err == nil {
				if tables(off) {
					accepted = append(accepted, off)
				}
				if got, err := describe(img); err != nil || got != want {
					t.Errorf("byte %d ^ 0x%02x is accepted and changes what the image means: %v", off, mask, err)
				}
			}
			img[off] ^= mask
		}
	}
	t.Logf("%d bytes of the tables without a meaning for the kernel: %v", len(slices.Compact(accepted)), slices.Compact(accepted))
}

// TestCheckFlippedAll changes each byte of a small image in turn: whatever Check
// accepts can be read to its end.
func TestCheckFlippedAll(t *testing.T) {
	t.Parallel()
	img := small().write(t)
	for off := range img {
		mask := []byte{0xff, 0x01, 0x80}[off%3]
		img[off] ^= mask
		_, err := checkImage(img, Limits{})
		if _, derr := describe(img); err == nil && derr != nil {
			t.Errorf("byte %d ^ 0x%02x is accepted: %v", off, mask, derr)
		}
		if _, err := checkImage(img, Limits{Defects: 1000}); err != nil {
			t.Errorf("byte %d ^ 0x%02x: with a list: %v", off, mask, err)
		}
		img[off] ^= mask
	}
}
