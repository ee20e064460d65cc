package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestTarAttributes(t *testing.T) {
	long := strings.Repeat("long-name/", 30) + "end"
	target := strings.Repeat("t", 300)
	binary := "\x00\x01=\n\xff 12 key=value\n"
	file := func(h tar.Header) tarEntry { return tarEntry{Header: h} }
	for _, c := range []struct {
		name  string
		entry tarEntry
		want  string // of the last line
	}{
		{"binary xattr", file(tar.Header{
			Name: "f", Mode: 0o644, Format: tar.FormatPAX,
			PAXRecords: map[string]string{
				"SCHILY.xattr.user.b": binary, "SCHILY.xattr.user.a": "", "SCHILY.xattr.security.capability": "\x01\x00",
				"comment": "no xattr", "SCHILY.xattr.com.apple.quarantine": "no Linux file system has it",
			},
		}), fmt.Sprintf(`f 100644 0:0 0 security.capability="\x01\x00" user.a="" user.b=%q `, binary)},
		{"nanoseconds", file(tar.Header{Name: "f", Format: tar.FormatPAX, ModTime: time.Unix(5, 123456789)}), "f 100000 0:0 5.123456789 "},
		{"before 1970", file(tar.Header{Name: "f", Format: tar.FormatPAX, ModTime: time.Unix(-5, 500)}), "f 100000 0:0 -5.000000500 "},
		{"setuid and type bits in the mode", file(tar.Header{Name: "f", Mode: 0o104755, Format: tar.FormatGNU}), "f 104755 0:0 0 "},
		{"large ids", file(tar.Header{Name: "f", Uid: 1<<32 - 1, Gid: 1 << 31, Format: tar.FormatPAX}), "f 100000 4294967295:2147483648 0 "},
		{"GNU long name", file(tar.Header{Name: long, Format: tar.FormatGNU}), long + " 100000 0:0 0 "},
		{"PAX long name", file(tar.Header{Name: long, Format: tar.FormatPAX}), long + " 100000 0:0 0 "},
		{"GNU long target", file(tar.Header{Name: "s", Typeflag: tar.TypeSymlink, Linkname: target, Format: tar.FormatGNU}), "s 120000 0:0 0 -> " + target},
		{"PAX long target", file(tar.Header{Name: "s", Typeflag: tar.TypeSymlink, Linkname: target, Format: tar.FormatPAX}), "s 120000 0:0 0 -> " + target},
		{"character device", file(tar.Header{Name: "c", Typeflag: tar.TypeChar, Mode: 0o600, Devmajor: 4095, Devminor: 1<<20 - 1}), "c 20600 0:0 0 4095,1048575"},
		{"block device", file(tar.Header{Name: "b", Typeflag: tar.TypeBlock, Devmajor: 8, Devminor: 1}), "b 60000 0:0 0 8,1"},
		{"fifo", file(tar.Header{Name: "p", Typeflag: tar.TypeFifo, Mode: 0o640}), "p 10640 0:0 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, s, err := overlay(makeTar(t, c.entry))
			if err != nil {
				t.Fatal(err)
			}
			lines := list(root, s)
			if got := lines[len(lines)-1]; got != c.want {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

func TestTarRefused(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"uid", "owner"},
		{"gid", "owner"},
		{"major", "device"},
		{"minor", "device"},
		{"type", "unknown entry type"},
		{"truncated header", "unexpected EOF"},
		{"truncated data", "unexpected EOF"},
		{"garbage", "invalid tar header"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := tar.Header{Name: "x", Typeflag: tar.TypeChar, Format: tar.FormatGNU, ModTime: time.Unix(0, 0)}
			content := ""
			switch c.name {
			case "uid":
				h.Uid = 1 << 32 // root's, were it cut to 32 bits
			case "gid":
				h.Gid = -1
			case "major":
				h.Devmajor = 4096
			case "minor":
				h.Devminor = 1 << 20
			case "type":
				h.Typeflag = 'Z'
			case "truncated data":
				h.Typeflag, h.Size, content = tar.TypeReg, 1000, strings.Repeat("x", 1000)
			}
			p := makeTar(t, tarEntry{Header: h, content: content})
			switch c.name {
			case "truncated header":
				p = p[:300]
			case "truncated data":
				p = p[:1000]
			case "garbage":
				p = bytes.Repeat([]byte("garbage!"), 200)
			}
			b := budget(defaultLimits)
			err := readTar(context.Background(), bytes.NewReader(p), newLayer(emptyDir(), &b), exactSink{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// An exactSink wants all bytes of a file and keeps none.
type exactSink struct{}

func (exactSink) file(_ context.Context, _ *erofs.Node, r io.Reader, size int64) error {
	_, err := io.CopyN(io.Discard, r, size)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func TestTarGlobalHeader(t *testing.T) {
	root, s, err := overlay(makeTar(t, tarEntry{Header: tar.Header{
		Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"},
	}}))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{implicitRoot}, list(root, s)); diff != "" {
		t.Error(diff)
	}
}

// A blank device number is what Python's tarfile writes for a FIFO.
func TestTarBlankDevice(t *testing.T) {
	p := makeTar(t, tarEntry{Header: tar.Header{Name: "p", Typeflag: tar.TypeFifo, Format: tar.FormatUSTAR, ModTime: time.Unix(0, 0)}})
	clear(p[329:345])
	for i := range 8 {
		p[148+i] = ' '
	}
	sum := 0
	for _, c := range p[:512] {
		sum += int(c)
	}
	copy(p[148:], fmt.Sprintf("%06o\x00 ", sum))
	root, s, err := overlay(p)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{implicitRoot, "p 10000 0:0 0"}, list(root, s)); diff != "" {
		t.Error(diff)
	}
}

func TestTarSparse(t *testing.T) {
	gnutar := testenv.Tool(t, "tar")
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	const size = 3<<20 + 17
	for i := range 6 { // more pieces than an old GNU header has room for
		if _, err := f.WriteAt([]byte(strings.Repeat(fmt.Sprint(i), 5000)), int64(i)<<19); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	f.Close()
	want, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range [][]string{
		{"--format=gnu"},
		{"--format=posix", "--sparse-version=0.0"},
		{"--format=posix", "--sparse-version=0.1"},
		{"--format=posix", "--sparse-version=1.0"},
	} {
		t.Run(strings.Join(format, " "), func(t *testing.T) {
			args := append(format, "--sparse", "-C", dir, "-cf", "-", "sparse")
			p, err := exec.Command(gnutar, args...).Output()
			if err != nil {
				t.Fatal(err)
			}
			if len(p) > 1<<20 {
				t.Fatalf("tar of %d bytes is not sparse", len(p))
			}
			root, s, err := overlay(p)
			if err != nil {
				t.Fatal(err)
			}
			n := root.Children["sparse"]
			if n == nil || n.Size != size || s[n] != string(want) {
				t.Errorf("read another file, in a directory of %d", len(root.Children))
			}
		})
	}
}

func TestBudget(t *testing.T) {
	many := func(n int) (e []tarEntry) {
		for i := range n {
			e = append(e, reg(fmt.Sprint("f", i), "x"))
		}
		return e
	}
	xattrs := tarEntry{Header: tar.Header{Name: "f", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 5000)}}}
	for _, c := range []struct {
		name    string
		entries []tarEntry
		want    string
	}{
		{"entries", many(101), "too many entries"},
		{"made up parents", []tarEntry{reg(strings.Repeat("d/", 100)+"f", "")}, "too many entries"},
		{"xattrs", []tarEntry{xattrs}, "too large together"},
		{"names", []tarEntry{dir(strings.Repeat("n", 200), 0), dir(strings.Repeat("m", 200), 0)}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := budget{entries: 100, meta: 4096, chunks: 10}
			err := readTar(context.Background(), bytes.NewReader(makeTar(t, c.entries...)), newLayer(emptyDir(), &b), memSink{})
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
	b := budget{chunks: 10}
	for _, size := range []int64{-1, 11 * 4096, 10*4096 + 1, 1<<63 - 1} {
		if err := b.file(size, 4096); err == nil {
			t.Errorf("file of %d bytes fits into 10 chunks", size)
		}
	}
	if err := b.file(10*4096, 4096); err != nil {
		t.Error(err)
	}
}

// FuzzTar reads anything as two layers: no panic, no hang, and a tree that only
// holds what an image may.
func FuzzTar(f *testing.F) {
	f.Add(makeTar(f, dir("d", 0o755), reg("d/f", "x"), hard("l", "d/f"), sym("s", "d"), reg("s/g", "y")), []byte{})
	f.Add(makeTar(f, reg("d/f", "x")), makeTar(f, reg(".wh.d", ""), reg("d/.wh..wh..opq", ""), hard("h", "d/f")))
	f.Add(makeTar(f, hard("a", "b"), hard("b", "a")), makeTar(f, sym("a", "b"), sym("b", "a"), reg("a/c", "")))
	f.Add(makeTar(f, tarEntry{Header: tar.Header{Name: "f", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "\x00"}}}), []byte("\x1f\x8b"))
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		b, root := budget{entries: 1000, meta: 1 << 20, chunks: 1 << 10}, emptyDir()
		for _, p := range [][]byte{lower, upper} {
			l := newLayer(root, &b)
			if err := readCompressedTar(ctx, bytes.NewReader(p), l, limitedSink{&b}); err != nil {
				return
			}
			var err error
			if root, err = l.merge(); err != nil {
				return
			}
		}
		if ctx.Err() != nil {
			t.Fatal("takes too long")
		}
		checkTree(t, root, 0)
	})
}

// A limitedSink reads what the budget allows, as the packer does.
type limitedSink struct{ b *budget }

func (s limitedSink) file(ctx context.Context, n *erofs.Node, r io.Reader, size int64) error {
	if err := s.b.file(size, 4096); err != nil {
		return err
	}
	return exactSink{}.file(ctx, n, r, size)
}

func checkTree(t *testing.T, n *erofs.Node, depth int) {
	if depth > maxDepth+1 {
		t.Fatal("too deep")
	}
	for name, c := range n.Children {
		if c == nil {
			t.Fatalf("%q: nothing there", name)
		}
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > maxName {
			t.Fatalf("name %q", name)
		}
		if strings.HasPrefix(name, whiteout) {
			t.Fatalf("whiteout %q is visible", name)
		}
		checkTree(t, c, depth+1)
	}
}
