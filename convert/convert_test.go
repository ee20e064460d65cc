package convert

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/erofsd/erofsd/internal/testenv"
)

// mustConvert converts src into a new directory.
func mustConvert(t testing.TB, src string, o Options) (string, *Result) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "image")
	r, err := ConvertToDir(t.Context(), src, dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return dir, r
}

func TestFixtureLayers(t *testing.T) {
	fixtures := testenv.Fixtures(t)
	want := testenv.LoadTree(t, "layered.jsonl")
	for _, pack := range []string{"gzip", "zstd", "plain"} {
		t.Run(pack, func(t *testing.T) {
			var layers [][]byte
			for i := range 3 {
				p, err := os.ReadFile(filepath.Join(fixtures, "layers", fmt.Sprint(i+1, ".tar.gz")))
				if err != nil {
					t.Fatal(err)
				}
				layers = append(layers, repack(t, p, pack))
			}
			dir, r := mustConvert(t, makeLayout(t, nil, layers...), Options{})
			if r.Layers != 3 {
				t.Errorf("%d layers", r.Layers)
			}
			want.Compare(t, openDir(t, dir).tree(t), true)
		})
	}
	t.Run("kernel", func(t *testing.T) {
		var layers [][]byte
		for i := range 3 {
			p, err := os.ReadFile(filepath.Join(fixtures, "layers", fmt.Sprint(i+1, ".tar.gz")))
			if err != nil {
				t.Fatal(err)
			}
			layers = append(layers, p)
		}
		dir, _ := mustConvert(t, makeLayout(t, nil, layers...), Options{ChunkSize: 64 << 10, Compressor: "lz4_block", Digester: "sha256"})
		compareMount(t, want, dir)
	})
}

// repack compresses a tar.gz otherwise.
func repack(t testing.TB, p []byte, how string) []byte {
	t.Helper()
	if how == "gzip" {
		return p
	}
	z, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if how == "plain" {
		return plain
	}
	return zstdOf(t, plain)
}

func zstdOf(t testing.TB, p []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(p, nil)
}

func gzipOf(t testing.TB, p []byte) []byte {
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

func toJSON(t testing.TB, v any) []byte {
	t.Helper()
	p, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// makeTree makes a directory with one of everything.
func makeTree(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	r := rand.New(rand.NewPCG(1, 2))
	random := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		return p
	}
	for _, size := range []int{0, 1, 4095, 4096, 4097, 1 << 18, 1<<18 + 1, 3<<18 + 5} {
		writeFile(t, filepath.Join(dir, "sizes", fmt.Sprint("random-", size)), random(size))
		writeFile(t, filepath.Join(dir, "sizes", fmt.Sprint("text-", size)), bytes.Repeat([]byte("text "), size/5+1)[:size])
	}
	sparse := writeFile(t, filepath.Join(dir, "sparse"), nil)
	if err := os.Truncate(sparse, 5<<20); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(sparse, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int64{1 << 20, 3<<20 + 123} {
		if _, err := f.WriteAt(random(9000), off); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(dir, "links"), 0o700))
	must(os.Link(filepath.Join(dir, "sizes", "text-4097"), filepath.Join(dir, "links", "hard")))
	must(os.Symlink("../sizes", filepath.Join(dir, "links", "soft")))
	must(os.Link(filepath.Join(dir, "links", "soft"), filepath.Join(dir, "links", "soft2")))
	must(syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	must(syscall.Setxattr(sparse, "user.note", []byte("a\x00b"), 0))
	writeFile(t, filepath.Join(dir, ".wh.plain"), []byte("only a name in a directory"))
	if os.Geteuid() == 0 {
		must(syscall.Mknod(filepath.Join(dir, "dev"), syscall.S_IFCHR|0o666, 0x12305|7<<20))
		must(os.Lchown(filepath.Join(dir, "links", "soft"), 70000, 1<<31))
		must(os.Chmod(filepath.Join(dir, "sizes"), 0o1777|os.ModeSticky))
	}
	return dir
}

func TestDirectory(t *testing.T) {
	src := makeTree(t)
	want, err := testenv.ScanTree(src, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []Options{{}, {ChunkSize: 4096, Compressor: "none"}, {ChunkSize: 16 << 20, Compressor: "lz4_block", Digester: "sha256"}} {
		t.Run(fmt.Sprint(o.ChunkSize, o.Compressor), func(t *testing.T) {
			dir, r := mustConvert(t, src, o)
			b := openDir(t, dir)
			want.Compare(t, b.tree(t), true)
			var in int64
			for p, e := range want {
				if p != "links/hard" {
					in += e.Size
				}
			}
			if r.In != in {
				t.Errorf("%d bytes in, want %d", r.In, in)
			}
		})
	}
	t.Run("kernel", func(t *testing.T) {
		dir, _ := mustConvert(t, src, Options{})
		compareMount(t, want, dir)
	})
	t.Run("fsck.erofs", func(t *testing.T) {
		fsck := testenv.Tool(t, "fsck.erofs")
		dir, _ := mustConvert(t, src, Options{})
		args := []string{filepath.Join(dir, bootstrapName)}
		for _, d := range devices(t, dir) {
			args = append(args, "--device="+d)
		}
		if out, err := exec.Command(fsck, args...).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

func TestNanoseconds(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	name := writeFile(t, filepath.Join(src, "f"), []byte("x"))
	when := time.Unix(1234567890, 987654321)
	if err := os.Chtimes(name, when, when); err != nil {
		t.Fatal(err)
	}
	dir, _ := mustConvert(t, src, Options{})
	n, err := openDir(t, dir).Lookup("f")
	if err != nil || n.Sec != when.Unix() || n.Nsec != uint32(when.Nanosecond()) {
		t.Errorf("mtime %d.%d, %v", n.Sec, n.Nsec, err)
	}
}

// TestReproducible converts the same input with different numbers of workers.
func TestReproducible(t *testing.T) {
	src := makeTree(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	var first map[string]string
	for _, n := range []int{1, 2, 8, 2} {
		runtime.GOMAXPROCS(n)
		dir, _ := mustConvert(t, src, Options{ChunkSize: 4096})
		files := readAll(t, dir)
		if first == nil {
			first = files
		}
		if !cmp.Equal(first, files) {
			t.Errorf("GOMAXPROCS %d gives other bytes", n)
		}
	}
	if len(first) != 2 {
		t.Errorf("%d files", len(first))
	}
}

// readAll reads the files below dir.
func readAll(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		content, err := os.ReadFile(p)
		files[strings.TrimPrefix(p, dir)] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestDeduplication(t *testing.T) {
	a, b := strings.Repeat("aaaa", 3000), strings.Repeat("bbbb", 3000)
	for _, c := range []struct {
		name   string
		layers [][]tarEntry
		blobs  int
		chunks int64
	}{
		{"in a layer", [][]tarEntry{{reg("1", a), reg("2", a), reg("3", b)}}, 1, 2},
		{"across layers", [][]tarEntry{{reg("1", a)}, {reg("2", a)}, {reg("3", b), reg("4", a)}}, 2, 2},
		{"no file", [][]tarEntry{{dir("d", 0o755), reg("empty", "")}}, 0, 0},
		{"removed", [][]tarEntry{{reg("1", a)}, {reg(".wh.1", ""), reg("2", b)}}, 1, 1},
		{"removed and back from below", [][]tarEntry{{reg("1", a), reg("0", b)}, {reg(".wh.1", ""), reg(".wh.0", "")}, {reg("2", a)}}, 1, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, makeTar(t, l...))
			}
			dir, r := mustConvert(t, makeLayout(t, nil, layers...), Options{ChunkSize: 16 << 10})
			if r.Blobs != c.blobs || r.Chunks != c.chunks {
				t.Errorf("%d blobs with %d chunks, want %d with %d", r.Blobs, r.Chunks, c.blobs, c.chunks)
			}
			list, err := os.ReadDir(filepath.Join(dir, blobsName))
			if err != nil || len(list) != c.blobs {
				t.Errorf("%d files in blobs, %v", len(list), err)
			}
			openDir(t, dir).tree(t)
		})
	}
}

func TestReplace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "image")
	for _, content := range []string{"one", "two"} {
		src := writeFile(t, filepath.Join(t.TempDir(), "t"), makeTar(t, reg("f", content)))
		if _, err := ConvertToDir(t.Context(), src, dir, Options{}); err != nil {
			t.Fatal(err)
		}
		b := openDir(t, dir)
		n, err := b.Lookup("f")
		if err != nil || string(b.content(t, n)) != content {
			t.Errorf("f is not %q: %v", content, err)
		}
	}
	list, _ := os.ReadDir(filepath.Join(dir, blobsName))
	if len(list) != 2 {
		t.Errorf("%d blobs, the first one should have stayed", len(list))
	}
}
