package erofs

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var updateWriter = flag.Bool("update-writer", false, "write testdata/writer.hex anew")

// TestWriteGolden pins every byte of a small image.
func TestWriteGolden(t *testing.T) {
	m := newModel(4096)
	m.root.Sec, m.root.UID = 1000000000, 7
	m.chunk(m.blob(), []byte("nobody uses this blob"))
	b := m.blob()
	m.put("big", m.file(b, bytes.Repeat([]byte("0123456789abcdef"), 600))) // contiguous: one kernel chunk
	m.put("dir/file", m.file(b, []byte("hello"))).Xattrs = []Xattr{{"user.b", []byte("2")}, {"security.a", []byte("11")}}
	m.put("dir/hard", m.root.Children["dir"].Children["file"])
	m.put("dir/!bang", &Node{Mode: typeChr | 0o666, Major: 300, Minor: 300})
	m.put("link", &Node{Mode: typeLnk | 0o777, Target: "dir/file", Nsec: 5})
	last := len(m.o.Blobs[b].Chunks) - 1
	m.put("swapped", &Node{Mode: typeReg | 0o600, Size: 4096 + 5, Chunks: []ChunkRef{{b, 0}, {b, uint32(last)}}})
	golden := filepath.Join("testdata", "writer.hex")
	got := hexdump(m.write(t))
	if *updateWriter {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); d != "" {
		t.Errorf("the image differs (go test -run WriteGolden -update-writer accepts it):\n%s", d)
	}
}

// hexdump shows the lines of 16 bytes that are not zero.
func hexdump(p []byte) string {
	var out strings.Builder
	for at := 0; at < len(p); at += 16 {
		line := p[at : at+16]
		if !bytes.Equal(line, zeros[:16]) {
			text := bytes.Map(func(r rune) rune {
				if r < ' ' || r > '~' {
					return '.'
				}
				return r
			}, line)
			fmt.Fprintf(&out, "%05x  %x %x  %s\n", at, line[:8], line[8:], text)
		}
	}
	fmt.Fprintf(&out, "%05x\n", len(p))
	return out.String()
}
