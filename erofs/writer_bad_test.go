package erofs

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

// TestWriteRefuses changes a good tree in one way each and wants one error that
// names the place, and no byte written.
func TestWriteRefuses(t *testing.T) {
	reg := func() *Node { return &Node{Mode: typeReg} }
	xattr := func(name, value string) func(*model) {
		return func(m *model) { m.put("d/f", &Node{Mode: typeReg, Xattrs: []Xattr{{name, []byte(value)}}}) }
	}
	node := func(n *Node) func(*model) { return func(m *model) { m.put("d/f", n) } }
	named := func(name string) func(*model) {
		return func(m *model) { m.root.Children["d"].Children[name] = reg() }
	}
	tests := []struct {
		name string
		edit func(*model)
		want string
	}{
		{"no root", func(m *model) { m.root = nil }, "root is not a directory"},
		{"root a file", func(m *model) { m.root = reg() }, "root is not a directory"},
		{"cycle to root", func(m *model) { m.put("d/e/up", m.root) }, "/d/e/up: the directory is also /:"},
		{"cycle", func(m *model) { d := m.put("d", dir(0)); d.Children["self"] = d }, "/d/self: the directory is also /d:"},
		{"directory twice", func(m *model) { m.put("z", m.root.Children["d"]) }, "/z: the directory is also /d:"},
		{"nil child", node(nil), "/d/f: no node"},
		{"empty name", named(""), `/d: "" cannot be`},
		{"dot", named("."), `/d: "." cannot be`},
		{"dot dot", named(".."), `/d: ".." cannot be`},
		{"slash", named("a/b"), `/d: name "a/b" holds a slash`},
		{"zero byte", named("a\x00"), `holds a slash or a zero byte`},
		{"long name", named(strings.Repeat("n", 256)), "of 256 bytes: at most 255"},
		{"no type", node(&Node{Mode: 0o644}), "/d/f: mode 0644"},
		{"bad type", node(&Node{Mode: 0o170644}), "/d/f: mode 0170644"},
		{"wide mode", node(&Node{Mode: 1<<16 | typeReg}), "/d/f: mode"},
		{"nanoseconds", node(&Node{Mode: typeReg, Nsec: 1e9}), "/d/f: mtime"},
		{"file with children", node(&Node{Mode: typeReg, Children: map[string]*Node{"x": reg()}}), "/d/f: has children"},
		{"fifo with chunks", node(&Node{Mode: typeFifo, Chunks: []ChunkRef{{}}}), "/d/f: has chunks"},
		{"negative size", node(&Node{Mode: typeReg, Size: -1}), "/d/f: size -1"},
		{"too few chunks", node(&Node{Mode: typeReg, Size: 4097, Chunks: []ChunkRef{{}}}), "/d/f: 1 chunks for 4097 bytes: must be 2"},
		{"too many chunks", node(&Node{Mode: typeReg, Chunks: []ChunkRef{{}}}), "/d/f: 1 chunks for 0 bytes: must be 0"},
		{"huge size", node(&Node{Mode: typeReg, Size: 1<<63 - 1}), "/d/f: 0 chunks for 9223372036854775807"},
		{"no such blob", node(&Node{Mode: typeReg, Size: 3, Chunks: []ChunkRef{{1, 0}}}), "/d/f: chunk 0: is in blob 1 of 1"},
		{"no such chunk", node(&Node{Mode: typeReg, Size: 3, Chunks: []ChunkRef{{0, 9}}}), "/d/f: chunk 0: is number 9"},
		{"chunk too long", node(&Node{Mode: typeReg, Size: 2, Chunks: []ChunkRef{{0, 0}}}), "/d/f: chunk 0: has 3 bytes, the file has 2 there"},
		{"chunk unaligned", func(m *model) { m.o.Blobs[0].Chunks[0].Off = 512 }, "multiple of 4096"},
		{"chunk outside", func(m *model) { m.o.Blobs[0].Chunks[0].Off = 4096 }, "end by 4096"},
		{"chunk far outside", func(m *model) { m.o.Blobs[0].Chunks[0].Off = 1<<63 - 4096 }, "end by 4096"},
		{"chunk index", func(m *model) { m.o.Blobs[0].Chunks[0].Index = 1 }, "index 1 in a blob of 1"},
		{"stored length", func(m *model) { m.o.Blobs[0].Chunks[0].CLen = 1 << 32 }, "stored bytes"},
		{"blob id empty", func(m *model) { m.o.Blobs[0].ID = "" }, "blob id"},
		{"blob id path", func(m *model) { m.o.Blobs[0].ID = "../x" }, "blob id"},
		{"blob size", func(m *model) { m.o.Blobs[0].Size = 4097 }, "cache file of 4097"},
		{"blob too large", func(m *model) { m.o.Blobs[0].Size = 1 << 44 }, "below 16 TiB"},
		{"entry chunk size", func(m *model) { m.o.Blobs[0].Entry[69] = 0x20 }, "its chunk size is 8192, the image's is 4096"},
		{"entry count", func(m *model) { m.o.Blobs[0].Entry[72] = 0 }, "counts 0 chunks"},
		{"entry size", func(m *model) { m.o.Blobs[0].Entry[97] = 0x20 }, "8192 bytes of cache file, not 4096"},
		{"encrypted", func(m *model) { m.o.Blobs[0].Entry[85] = 1 }, "encrypted data blobs: unsupported"},
		{"chunk size", func(m *model) { m.o.ChunkSize = 5000 }, "chunk size 5000"},
		{"no chunk size", func(m *model) { m.o.ChunkSize = 0 }, "chunk size 0"},
		{"codec", func(m *model) { m.o.Codec = 4 }, "codec 4"},
		{"digester", func(m *model) { m.o.Digester = 1 << 31 }, "digester 2147483648"},
		{"device number", node(&Node{Mode: typeChr, Major: 4096}), "/d/f: device 4096:0"},
		{"device minor", node(&Node{Mode: typeBlk, Minor: 1 << 20}), "/d/f: device 0:1048576"},
		{"empty target", node(&Node{Mode: typeLnk}), "/d/f: symlink target of 0 bytes"},
		{"long target", node(&Node{Mode: typeLnk, Target: strings.Repeat("t", 4096)}), "/d/f: symlink target of 4096 bytes"},
		{"target with zero", node(&Node{Mode: typeLnk, Target: "a\x00b"}), "/d/f: symlink target holds"},
		{"xattr prefix", xattr("system.nfs4_acl", ""), `/d/f: extended attribute "system.nfs4_acl": EROFS has no number`},
		{"xattr bare", xattr("user.", ""), `/d/f: extended attribute "user.": EROFS has no`},
		{"xattr acl suffix", xattr("system.posix_acl_access.x", ""), "EROFS has no number"},
		{"xattr long name", xattr("user."+strings.Repeat("n", 251), ""), "at most 255 bytes"},
		{"xattr zero", xattr("user.a\x00b", ""), "no zero byte"},
		{"xattr long value", xattr("user.v", strings.Repeat("v", 65536)), "65536 bytes: at most 65535"},
		{"xattr twice", node(&Node{Mode: typeReg, Xattrs: []Xattr{{"user.a", nil}, {"user.b", nil}, {"user.a", nil}}}), `"user.a": is listed twice`},
		{"xattrs too many", node(&Node{Mode: typeReg, Xattrs: []Xattr{
			{"user.a", make([]byte, 65535)}, {"user.b", make([]byte, 65535)}, {"user.c", make([]byte, 65535)}, {"user.d", make([]byte, 65535)},
		}}), "/d/f: extended attributes take"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			m := newModel(4096)
			m.put("d/good", m.file(m.blob(), []byte("abc")))
			m.finish()
			test.edit(m)
			var out bytes.Buffer
			err := Write(&out, m.root, m.o)
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), "write bootstrap: ") {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
			if out.Len() > 0 {
				t.Errorf("%d bytes were written", out.Len())
			}
		})
	}
}

func TestWriteRefusesBlobs(t *testing.T) {
	m := newModel(4096)
	for i := range maxBlobs + 1 {
		m.put(strings.Repeat("f", i+1)[:min(i+1, 250)]+string(rune('a'+i%26)), m.file(m.blob(), []byte{1}))
	}
	m.finish()
	if err := Write(io.Discard, m.root, m.o); err == nil || !strings.Contains(err.Error(), "255 data blobs, an image holds at most 254") {
		t.Errorf("255 blobs: %v", err)
	}
	m = newModel(4096)
	m.put("a", m.file(m.blob(), []byte{1}))
	m.put("b", m.file(m.blob(), []byte{1}))
	m.finish()
	m.o.Blobs[1].ID = m.o.Blobs[0].ID
	if err := Write(io.Discard, m.root, m.o); err == nil || !strings.Contains(err.Error(), "is listed twice") {
		t.Errorf("one id for two blobs: %v", err)
	}
}

// A failingWriter takes n bytes.
type failingWriter struct{ n int }

var errFull = errors.New("disk full")

func (w *failingWriter) Write(p []byte) (int, error) {
	if len(p) > w.n {
		return w.n, errFull
	}
	w.n -= len(p)
	return len(p), nil
}

func TestWriteToFailing(t *testing.T) {
	m := everything(4096)
	size := len(m.write(t))
	for _, n := range []int{0, 1, size / 2, size - 1} {
		if err := Write(&failingWriter{n}, m.root, m.o); !errors.Is(err, errFull) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
	if err := Write(&failingWriter{size}, m.root, m.o); err != nil {
		t.Error(err)
	}
}
