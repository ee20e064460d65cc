package erofs

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
)

// A model is a tree with the plain bytes of its blobs.
type model struct {
	root    *Node
	o       WriteOptions
	devices [][]byte // cache files, as o.Blobs
}

func newModel(chunkSize uint32) *model {
	return &model{root: dir(0o755), o: WriteOptions{ChunkSize: chunkSize, Codec: 3}}
}

func dir(perm uint32) *Node { return &Node{Mode: typeDir | perm, Children: map[string]*Node{}} }

// put places n at p, making directories on the way.
func (m *model) put(p string, n *Node) *Node {
	at := m.root
	parent, name := path.Split(p)
	for part := range strings.SplitSeq(strings.Trim(parent, "/"), "/") {
		if part == "" {
			continue
		}
		if at.Children[part] == nil {
			at.Children[part] = dir(0o755)
		}
		at = at.Children[part]
	}
	at.Children[name] = n
	return n
}

// blob adds an empty blob and returns its position.
func (m *model) blob() uint32 {
	k := len(m.o.Blobs)
	id := sha256.Sum256([]byte{byte(k), byte(k >> 8)})
	m.o.Blobs = append(m.o.Blobs, Blob{ID: fmt.Sprintf("%x", id)})
	m.devices = append(m.devices, nil)
	return uint32(k)
}

// chunk appends p to blob k as one chunk.
func (m *model) chunk(k uint32, p []byte) ChunkRef {
	b := &m.o.Blobs[k]
	c := ChunkInfo{
		Digest: sha256.Sum256(p), Blob: k, Index: uint32(len(b.Chunks)),
		COff: int64(len(m.devices[k])) / 2, CLen: int64(len(p)), Off: int64(len(m.devices[k])), Len: int64(len(p)),
	}
	b.Chunks = append(b.Chunks, c)
	m.devices[k] = append(m.devices[k], p...)
	m.devices[k] = append(m.devices[k], make([]byte, -len(p)&(blockSize-1))...)
	b.Size = int64(len(m.devices[k]))
	return ChunkRef{k, c.Index}
}

// file returns a file of data whose chunks are appended to blob k.
func (m *model) file(k uint32, data []byte) *Node {
	n := &Node{Mode: typeReg | 0o644, Size: int64(len(data))}
	for c := range slices.Chunk(data, int(m.o.ChunkSize)) {
		n.Chunks = append(n.Chunks, m.chunk(k, c))
	}
	return n
}

// write finishes the blob entries and returns the image.
func (m *model) write(t testing.TB) []byte {
	t.Helper()
	m.finish()
	var out bytes.Buffer
	if err := Write(&out, m.root, m.o); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func (m *model) finish() {
	le := binary.LittleEndian
	for k := range m.o.Blobs {
		b := &m.o.Blobs[k]
		n := uint32(len(b.Chunks))
		le.PutUint32(b.Entry[68:], m.o.ChunkSize)
		le.PutUint32(b.Entry[72:], n)
		le.PutUint32(b.Entry[76:], m.o.Codec)
		le.PutUint32(b.Entry[80:], m.o.Digester)
		le.PutUint32(b.Entry[84:], 0x40000021) // ALIGNED, INLINED_CHUNK_DIGEST, CAP_TAR_TOC
		le.PutUint64(b.Entry[88:], uint64(b.Size))
		le.PutUint64(b.Entry[96:], uint64(b.Size))
		le.PutUint64(b.Entry[112:], uint64(b.Size))
		le.PutUint64(b.Entry[120:], uint64(n)*16)
		le.PutUint64(b.Entry[128:], uint64(n)*16)
	}
}

// used returns the devices of the image in its own order: those of the blobs
// whose ids are in the device table.
func (m *model) used(t testing.TB, img []byte) [][]byte {
	t.Helper()
	var out [][]byte
	for k := range binary.LittleEndian.Uint16(img[superOffset+86:]) {
		tag := string(img[deviceTable+int(k)*deviceSize:][:idSize])
		i := slices.IndexFunc(m.o.Blobs, func(b Blob) bool { return b.ID == tag })
		if i < 0 {
			t.Fatalf("device %d has the unknown tag %q", k, tag)
		}
		out = append(out, m.devices[i])
	}
	return out
}

func (m *model) content(n *Node) []byte {
	var out []byte
	for _, r := range n.Chunks {
		c := m.o.Blobs[r.Blob].Chunks[r.Chunk]
		out = append(out, m.devices[r.Blob][c.Off:c.Off+c.Len]...)
	}
	return out
}

// A record is what can be observed of one path.
type record struct {
	mode, uid, gid, major, minor, nlink uint32
	sec                                 int64
	nsec                                uint32
	size                                int64 // not of directories
	target                              string
	sum                                 [32]byte
	xattrs                              string
}

func xattrString(x map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(x)) {
		fmt.Fprintf(&b, "%s=%x;", k, x[k])
	}
	return b.String()
}

// records lists the model's paths, "." for the root.
func (m *model) records() map[string]record {
	links := map[*Node]uint32{}
	var count func(n *Node)
	count = func(n *Node) {
		links[n] += 2
		for _, c := range n.Children {
			if c.Mode&typeMask == typeDir {
				links[n]++
				count(c)
			} else {
				links[c]++
			}
		}
	}
	count(m.root)
	out := map[string]record{}
	var add func(p string, n *Node)
	add = func(p string, n *Node) {
		r := record{
			mode: n.Mode, uid: n.UID, gid: n.GID, nlink: links[n],
			sec: n.Sec, nsec: n.Nsec, target: n.Target,
		}
		switch n.Mode & typeMask {
		case typeReg:
			r.size, r.sum = n.Size, sha256.Sum256(m.content(n))
		case typeLnk:
			r.size = int64(len(n.Target))
		case typeChr, typeBlk:
			r.major, r.minor = n.Major, n.Minor
		}
		x := map[string]string{}
		for _, a := range n.Xattrs {
			x[a.Name] = string(a.Value)
		}
		r.xattrs = xattrString(x)
		out[p] = r
		for name, c := range n.Children {
			add(path.Join(p, name), c)
		}
	}
	add(".", m.root)
	return out
}

func compare(t testing.TB, who string, got, want map[string]record) {
	t.Helper()
	bad := 0
	for p, w := range want {
		g, ok := got[p]
		if ok && g == w {
			continue
		}
		if t.Errorf("%s: %.100s:\n got %+v\nwant %+v", who, p, g, w); bad == 5 {
			t.FailNow()
		}
		bad++
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Fatalf("%s: %.100s is not in the model", who, p)
		}
	}
}

// checkGoErofs reads the image with go-erofs and compares all of it.
func (m *model) checkGoErofs(t testing.TB, img []byte) {
	t.Helper()
	var opts []goerofs.OpenOpt
	for _, d := range m.used(t, img) {
		opts = append(opts, goerofs.WithExtraDevices(bytes.NewReader(d)))
	}
	fsys, err := goerofs.Open(bytes.NewReader(img), opts...)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]record{}
	err = fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		info, err := d.Info()
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		s := info.Sys().(*goerofs.Stat)
		r := record{
			mode: goMode(s.Mode), uid: s.UID, gid: s.GID, nlink: uint32(s.Nlink), sec: int64(s.Mtime), nsec: s.MtimeNs,
			// go-erofs 0.3.1 puts a dot behind the names of POSIX ACLs.
			xattrs: strings.ReplaceAll(strings.ReplaceAll(xattrString(s.Xattrs), "acl_access.=", "acl_access="), "acl_default.=", "acl_default="),
		}
		switch r.mode & typeMask {
		case typeChr, typeBlk:
			r.major, r.minor = s.Rdev>>8&0xfff, s.Rdev&0xff|s.Rdev>>12&0xfff00
		case typeLnk:
			if r.target, err = fs.ReadLink(fsys, p); err != nil {
				return err
			}
			r.size = s.Size
		case typeReg:
			data, err := fs.ReadFile(fsys, p)
			if err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			r.size, r.sum = s.Size, sha256.Sum256(data)
		}
		got[p] = r
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	compare(t, "go-erofs", got, m.records())
}

func goMode(m fs.FileMode) uint32 {
	out := uint32(m.Perm())
	for bit, v := range map[fs.FileMode]uint32{
		fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000,
	} {
		if m&bit != 0 {
			out |= v
		}
	}
	switch m.Type() {
	case 0:
		return out | typeReg
	case fs.ModeDir:
		return out | typeDir
	case fs.ModeSymlink:
		return out | typeLnk
	case fs.ModeNamedPipe:
		return out | typeFifo
	case fs.ModeSocket:
		return out | typeSock
	case fs.ModeDevice:
		return out | typeBlk
	}
	return out | typeChr
}

func noise(r *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// everything is a tree with every kind of node at its limits.
func everything(chunkSize uint32) *model {
	m := newModel(chunkSize)
	r := rand.New(rand.NewPCG(1, 2))
	c := int(chunkSize)
	m.root.Sec, m.root.Nsec = 1700000000, 123456789
	b0, unused, b1 := m.blob(), m.blob(), m.blob()
	m.chunk(unused, noise(r, 100))
	for _, n := range []int{0, 1, 4095, 4096, 4097, c - 1, c, c + 1, 3*c + 17} {
		m.put(fmt.Sprintf("sizes/%d", n), m.file(b0, noise(r, n)))
	}
	// Chunks out of order, repeated, and of two blobs.
	x, y, z := m.chunk(b1, noise(r, c)), m.chunk(b0, noise(r, c)), m.chunk(b1, noise(r, 5))
	m.put("mixed", &Node{Mode: typeReg | 0o4755, UID: 1<<32 - 2, GID: 1 << 31, Size: int64(4*c + 5), Chunks: []ChunkRef{x, y, x, x, z}})
	m.put("repeat", &Node{Mode: typeReg | 0o2600, Size: int64(2 * c), Chunks: []ChunkRef{y, y}})
	h := m.put("links/a", m.file(b1, []byte("shared")))
	m.put("links/deep/b", h)
	m.put("c", h)
	m.put("dev/fifo", &Node{Mode: typeFifo | 0o600})
	m.put("dev/sock", &Node{Mode: typeSock | 0o600})
	m.put("dev/chr", &Node{Mode: typeChr | 0o666, Major: 4095, Minor: 1<<20 - 1})
	m.put("dev/blk", &Node{Mode: typeBlk | 0o660, Major: 8, Minor: 257})
	m.put("dev/null", &Node{Mode: typeChr | 0o666, Major: 1, Minor: 3})
	for _, n := range []int{1, 59, 1000, 4031, 4032, 4033, 4095} {
		m.put(fmt.Sprintf("sym/%d", n), &Node{Mode: typeLnk | 0o777, Target: strings.Repeat("t", n)})
	}
	for i := range 700 { // several blocks, the last name of a block at its end and before it
		m.put(fmt.Sprintf("many/%03d%s", i, strings.Repeat(string(rune('a'+i%26)), i%253)), &Node{Mode: typeReg})
	}
	for _, name := range []string{"!bang", "-dash", ".hidden", "..x", "\xff\xfe", "Ünïcode", strings.Repeat("n", 255), "sp ace", "new\nline"} {
		m.put("names/"+name, &Node{Mode: typeReg | 0o400, Sec: -5, Nsec: 999999999})
	}
	deep := strings.Repeat("d/", 300) + "leaf"
	m.put(deep, m.file(b1, []byte("deep")))
	m.put("empty", dir(0o1777))
	// Directories whose data just fits, just does not fit behind the inode, and fills blocks.
	for _, fill := range []int{3900, 4031, 4032, 4033, 4090, 4096, 4097, 8192} {
		d := m.put(fmt.Sprintf("fit/%d", fill), dir(0o755))
		size := direntSize*2 + 3
		for i := 0; fill-size > direntSize; i++ {
			l := min(fill-size-direntSize, 200)
			d.Children[fmt.Sprintf("%03d", i)[:min(3, l)]+strings.Repeat("f", l-min(3, l))] = &Node{Mode: typeReg}
			size += direntSize + l
		}
	}
	many := m.put("x/many", m.file(b0, []byte("x")))
	for i := range 40 {
		many.Xattrs = append(many.Xattrs, Xattr{fmt.Sprintf("user.%02d", 39-i), noise(r, i*7)})
	}
	acl := []byte("\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x02\x00\x05\x00\xe8\x03\x00\x00\x04\x00\x05\x00\xff\xff\xff\xff\x10\x00\x05\x00\xff\xff\xff\xff\x20\x00\x05\x00\xff\xff\xff\xff")
	m.put("x/acl", dir(0o755)).Xattrs = []Xattr{{"system.posix_acl_default", acl}, {"system.posix_acl_access", acl}}
	for i := range 20 {
		n := m.put(fmt.Sprintf("x/same/%02d", i), m.file(b0, []byte{byte(i)}))
		n.Xattrs = []Xattr{{"security.test", bytes.Repeat([]byte("label"), 40)}, {"user.n", []byte{byte(i)}}, {"trusted.t", nil}}
	}
	m.put("x/link", &Node{Mode: typeLnk | 0o777, Target: "same", Xattrs: []Xattr{{"trusted.l", []byte("1")}}})
	m.put("x/dir", dir(0o700)).Xattrs = []Xattr{{"user.big", noise(r, 3990)}}
	m.put("x/dir/child", &Node{Mode: typeFifo, Xattrs: []Xattr{{"security.test", bytes.Repeat([]byte("label"), 40)}}})
	m.put("x/huge", m.file(b1, noise(r, 2*c+1))).Xattrs = []Xattr{{"trusted.h", noise(r, 65535)}, {"user." + strings.Repeat("k", 250), noise(r, 9)}}
	return m
}
