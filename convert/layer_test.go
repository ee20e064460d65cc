package convert

import (
	"archive/tar"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/erofsd/erofsd/erofs"
)

const (
	implicitRoot = ". 40755 0:0 0"
	filePrefix   = " 100644 0:0 0 "
)

func TestLayers(t *testing.T) {
	type layers [][]tarEntry
	for _, c := range []struct {
		name   string
		layers layers
		want   []string // without the root when it is implicit
		fails  string
	}{
		{
			name: "clean paths", layers: layers{{reg("./a", "1"), reg("/b", "2"), reg("c//./d", "3")}},
			want: []string{"a" + filePrefix + "1", "b" + filePrefix + "2", "c 40755 0:0 0", "c/d" + filePrefix + "3"},
		},
		{name: "dot dot", layers: layers{{reg("a/../../b", "1")}}, fails: "leads out of the image"},
		{name: "dot dot inside", layers: layers{{reg("a/../b", "1")}}, fails: "leads out of the image"},
		{name: "dot dot hard link", layers: layers{{reg("a", "1"), hard("b", "../etc/passwd")}}, fails: "leads out of the image"},
		{name: "empty name", layers: layers{{reg("", "1")}}, fails: "without a name"},
		{name: "root is a file", layers: layers{{sym("./", "x")}}, fails: "root is not a directory"},
		{name: "root is a link", layers: layers{{reg("a", "1"), hard(".", "a")}}, fails: "root is not a directory"},
		{name: "long component", layers: layers{{reg(strings.Repeat("n", 256), "1")}}, fails: "at most 255"},
		{name: "whiteout of a long name", layers: layers{{reg(strings.Repeat("n", 255), "1")}, {reg(".wh."+strings.Repeat("n", 255), "")}}, want: nil},
		{name: "too deep", layers: layers{{reg(strings.Repeat("d/", 1100)+"f", "1")}}, fails: "directories deep"},
		{name: "root attributes", layers: layers{{dir("./", 0o1777)}}, want: []string{". 41777 7:0 9"}},
		{name: "duplicate, last wins", layers: layers{{reg("a", "old"), reg("a", "new")}}, want: []string{"a" + filePrefix + "new"}},
		{
			name: "duplicate directories merge", layers: layers{{dir("d", 0o700), reg("d/x", "1"), dir("d", 0o711)}},
			want: []string{"d 40711 7:0 9", "d/x" + filePrefix + "1"},
		},
		{name: "file over directory", layers: layers{{reg("d/x", "1"), reg("d", "2")}}, want: []string{"d" + filePrefix + "2"}},
		{
			name: "directory over file hides what is below", layers: layers{{reg("d/low", "1")}, {reg("d", "2"), dir("d", 0o700)}},
			want: []string{"d 40700 7:0 9"},
		},
		{
			name: "parent comes later", layers: layers{{reg("d/x", "1"), dir("d", 0o700)}},
			want: []string{"d 40700 7:0 9", "d/x" + filePrefix + "1"},
		},
		{
			name: "implicit parent keeps lower attributes", layers: layers{{dir("d", 0o1777)}, {reg("d/x", "1")}},
			want: []string{"d 41777 7:0 9", "d/x" + filePrefix + "1"},
		},
		{
			name: "explicit parent replaces lower attributes", layers: layers{{dir("d", 0o1777)}, {dir("d", 0o700)}},
			want: []string{"d 40700 7:0 9"},
		},
		{name: "upper root", layers: layers{{dir("./", 0o1777)}, {reg("x", "1")}}, want: []string{". 41777 7:0 9", "x" + filePrefix + "1"}},
		{
			name: "parent is a lower file", layers: layers{{reg("d", "1")}, {reg("d/x", "2")}},
			want: []string{"d 40755 0:0 0", "d/x" + filePrefix + "2"},
		},
		{name: "whiteout", layers: layers{{reg("a", "1"), reg("b", "2")}, {reg(".wh.a", "")}}, want: []string{"b" + filePrefix + "2"}},
		{
			name:   "whiteout of a directory, entries of the same layer stay",
			layers: layers{{reg("d/low", "1")}, {reg("d/up", "2"), reg(".wh.d", "")}},
			want:   []string{"d 40755 0:0 0", "d/up" + filePrefix + "2"},
		},
		{
			name: "opaque first", layers: layers{{dir("d", 0o711), reg("d/low", "1")}, {reg("d/.wh..wh..opq", ""), reg("d/up", "2")}},
			want: []string{"d 40711 7:0 9", "d/up" + filePrefix + "2"},
		},
		{
			name: "opaque last", layers: layers{{dir("d", 0o711), reg("d/low", "1")}, {reg("d/up", "2"), reg("d/.wh..wh..opq", "")}},
			want: []string{"d 40711 7:0 9", "d/up" + filePrefix + "2"},
		},
		{name: "opaque root", layers: layers{{reg("a", "1")}, {reg(".wh..wh..opq", ""), reg("b", "2")}}, want: []string{"b" + filePrefix + "2"}},
		{
			name: "whiteouts in the lowest layer", layers: layers{{reg(".wh.a", ""), reg("b", "2"), reg(".wh..wh..opq", ""), reg(".wh..wh.plnk/1.2", "x")}},
			want: []string{"b" + filePrefix + "2"},
		},
		{
			name: "whiteout and its name in one layer", layers: layers{{reg("a", "1")}, {reg("a", "2"), reg(".wh.a", "")}},
			want: []string{"a" + filePrefix + "2"},
		},
		{name: "whiteout does not reach upwards", layers: layers{{reg(".wh.a", "")}, {reg("a", "1")}}, want: []string{"a" + filePrefix + "1"}},
		{name: "below a whiteout", layers: layers{{reg(".wh.d/x", "1")}}, fails: "below a whiteout"},
		{name: "whiteout of nothing", layers: layers{{reg("d/.wh.", "")}}, fails: "whiteout of nothing"},
		{name: "whiteout of dot dot", layers: layers{{reg("d/.wh...", "")}}, fails: "whiteout of nothing"},
		{name: "wh inside a name", layers: layers{{reg("x.wh.y", "1")}}, want: []string{"x.wh.y" + filePrefix + "1"}},
		{
			name: "hard link to earlier", layers: layers{{reg("a", "1"), hard("b", "./a")}},
			want: []string{"a" + filePrefix + "1", "b" + filePrefix + "1 = a"},
		},
		{
			name: "hard link to later", layers: layers{{hard("a", "z"), hard("b", "a"), reg("z", "1")}},
			want: []string{"a" + filePrefix + "1", "b" + filePrefix + "1 = a", "z" + filePrefix + "1 = a"},
		},
		{
			name: "hard link to lower", layers: layers{{reg("d/a", "1")}, {hard("b", "d/a")}},
			want: []string{"b" + filePrefix + "1", "d 40755 0:0 0", "d/a" + filePrefix + "1 = b"},
		},
		{
			name: "lower wins over later", layers: layers{{reg("a", "old")}, {hard("b", "a"), reg("a", "new")}},
			want: []string{"a" + filePrefix + "new", "b" + filePrefix + "old"},
		},
		{
			name: "hard link to what the layer removes", layers: layers{{reg("a", "1")}, {reg(".wh.a", ""), hard("b", "a")}},
			want: []string{"b" + filePrefix + "1"},
		},
		{
			name: "target replaced after the link", layers: layers{{reg("a", "1"), hard("b", "a"), reg("a", "2")}},
			want: []string{"a" + filePrefix + "2", "b" + filePrefix + "1"},
		},
		{name: "hard link over its own name", layers: layers{{reg("a", "1"), hard("a", "a")}}, want: []string{"a" + filePrefix + "1"}},
		{name: "hard link over its own lower name", layers: layers{{reg("a", "1")}, {hard("a", "a")}}, want: []string{"a" + filePrefix + "1"}},
		{name: "hard link to itself only", layers: layers{{hard("a", "a")}}, fails: "circle"},
		{name: "hard links in a circle", layers: layers{{hard("a", "b"), hard("b", "a")}}, fails: "circle"},
		{name: "hard link to nothing", layers: layers{{reg("x", "1"), hard("a", "gone/b")}}, fails: `hard link to "gone/b": neither this layer nor one below has it`},
		{name: "hard link to a directory", layers: layers{{dir("d", 0o700), hard("a", "d")}}, fails: "hard link to the directory"},
		{name: "hard link to a later directory", layers: layers{{hard("a", "d"), dir("d", 0o700)}}, fails: "hard link to the directory"},
		{
			name: "hard link to a symlink", layers: layers{{sym("s", "t"), hard("a", "s")}},
			want: []string{"a 120777 0:0 0 -> t", "s 120777 0:0 0 -> t = a"},
		},
		{
			name: "parent is a lower symlink", layers: layers{{dir("usr/lib", 0o711), sym("lib", "usr/lib")}, {reg("lib/x", "1")}},
			want: []string{"lib 120777 0:0 0 -> usr/lib", "usr 40755 0:0 0", "usr/lib 40711 7:0 9", "usr/lib/x" + filePrefix + "1"},
		},
		{
			name: "parent is an absolute symlink", layers: layers{{sym("a/s", "/b/../../c")}, {reg("a/s/x", "1")}},
			want: []string{"a 40755 0:0 0", "a/s 120777 0:0 0 -> /b/../../c", "b 40755 0:0 0", "c 40755 0:0 0", "c/x" + filePrefix + "1"},
		},
		{
			name: "directory over a lower symlink", layers: layers{{sym("lib", "usr/lib")}, {dir("lib", 0o700), reg("lib/x", "1")}},
			want: []string{"lib 40700 7:0 9", "lib/x" + filePrefix + "1"},
		},
		{name: "symlinks in a circle", layers: layers{{sym("a", "b"), sym("b", "a"), reg("a/x", "1")}}, fails: "too many symlinks"},
		{
			name: "symlink out of the root", layers: layers{{sym("s", "../../.."), reg("s/x", "1")}},
			want: []string{"s 120777 0:0 0 -> ../../..", "x" + filePrefix + "1"},
		},
		{name: "empty symlink", layers: layers{{sym("s", "")}}, fails: "without a target"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var tars [][]byte
			for _, l := range c.layers {
				tars = append(tars, makeTar(t, l...))
			}
			root, s, err := overlay(tars...)
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Fatalf("error %v, want %q", err, c.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := c.want
			if len(want) == 0 || !strings.HasPrefix(want[0], ". ") {
				want = append([]string{implicitRoot}, want...)
			}
			if diff := cmp.Diff(want, list(root, s)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A modelFile is an inode of the reference model.
type modelFile struct {
	content string // "" for a directory
	mode    uint32
}

// A model unpacks layers the obvious way: a flat map from path to inode,
// whiteouts of a layer first, then its entries in order.
type model map[string]*modelFile

func (m model) removeAll(name string, self bool) {
	for p := range m {
		if self && p == name || strings.HasPrefix(p, name+"/") || name == "." {
			delete(m, p)
		}
	}
}

func (m model) parents(name string) {
	if d := path.Dir(name); d != "." {
		m.parents(d)
		if f := m[d]; f == nil || f.content != "" {
			m[d] = &modelFile{mode: 0o755}
		}
	}
}

// apply unpacks one layer; false when a hard link has no target by then.
func (m model) apply(entries []tarEntry) bool {
	for _, e := range entries {
		d, base := path.Dir(e.Name), path.Base(e.Name)
		if base == opaque {
			m.removeAll(d, false)
		} else if gone, ok := strings.CutPrefix(base, whiteout); ok {
			m.removeAll(path.Join(d, gone), true)
		}
	}
	for _, e := range entries {
		m.parents(e.Name)
		if strings.HasPrefix(path.Base(e.Name), whiteout) {
			continue
		}
		old := m[e.Name]
		switch e.Typeflag {
		case tar.TypeDir:
			if old != nil && old.content == "" {
				old.mode = uint32(e.Mode)
				continue
			}
			m[e.Name] = &modelFile{mode: uint32(e.Mode)}
		case tar.TypeLink:
			to := m[e.Linkname]
			if to == nil || to.content == "" {
				return false
			}
			m.removeAll(e.Name, true)
			m[e.Name] = to
		default:
			m.removeAll(e.Name, true)
			m[e.Name] = &modelFile{content: e.content, mode: 0o644}
		}
	}
	return true
}

// clone copies directories, whose mode changes; files never change.
func (m model) clone() model {
	c := maps.Clone(m)
	for name, f := range c {
		if f.content == "" {
			c[name] = &modelFile{mode: f.mode}
		}
	}
	return c
}

// randomLayer makes entries out of few names, so that they meet often.
func randomLayer(r *rand.Rand, m model) []tarEntry {
	name := func() string {
		parts := make([]string, 1+r.IntN(3))
		for i := range parts {
			parts[i] = string(rune('a' + r.IntN(3)))
		}
		return strings.Join(parts, "/")
	}
	var entries []tarEntry
	for range 1 + r.IntN(10) {
		n := name()
		switch r.IntN(7) {
		case 0, 1:
			entries = append(entries, dir(n, int64(0o700+r.IntN(8))))
		case 2:
			entries = append(entries, reg(path.Join(path.Dir(n), whiteout+path.Base(n)), ""))
		case 3:
			entries = append(entries, reg(path.Join(n, opaque), ""))
		case 4:
			now := m.clone()
			now.apply(entries)
			var files []string
			for k, f := range now {
				if f.content != "" && !strings.HasPrefix(k, n+"/") && !strings.HasPrefix(n, k+"/") {
					files = append(files, k)
				}
			}
			if slices.Sort(files); len(files) > 0 {
				entries = append(entries, hard(n, files[r.IntN(len(files))]))
			}
		default:
			entries = append(entries, reg(n, fmt.Sprint("content ", r.IntN(1000))))
		}
	}
	return entries
}

func TestMergeModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for round := range 3000 {
		m := model{}
		var tars [][]byte
		var story []string
		for range 1 + r.IntN(4) {
			entries := randomLayer(r, m)
			next := m.clone()
			if !next.apply(entries) {
				continue // a whiteout took away what a link was made for
			}
			m = next
			tars = append(tars, makeTar(t, entries...))
			story = append(story, "layer")
			for _, e := range entries {
				story = append(story, fmt.Sprintf("  %c %s %s %o", e.Typeflag, e.Name, e.Linkname, e.Mode))
			}
		}
		root, s, err := overlay(tars...)
		if err != nil {
			t.Fatalf("round %d: %v\n%s", round, err, strings.Join(story, "\n"))
		}
		if diff := cmp.Diff(m.lines(), treeLines(root, s)); diff != "" {
			t.Fatalf("round %d: %s\n%s", round, diff, strings.Join(story, "\n"))
		}
	}
}

func (m model) lines() []string {
	var lines []string
	for name, f := range m {
		var same []string
		for other, g := range m {
			if f == g && f.content != "" {
				same = append(same, other)
			}
		}
		slices.Sort(same)
		lines = append(lines, fmt.Sprintf("%s %o %q %v", name, f.mode, f.content, same))
	}
	slices.Sort(lines)
	return lines
}

func treeLines(root *erofs.Node, s memSink) []string {
	names := make(map[*erofs.Node][]string)
	var nodes []*erofs.Node
	var walk func(dir string, n *erofs.Node)
	walk = func(dir string, n *erofs.Node) {
		for name, c := range n.Children {
			if names[c] == nil {
				nodes = append(nodes, c)
			}
			names[c] = append(names[c], path.Join(dir, name))
			walk(path.Join(dir, name), c)
		}
	}
	walk("", root)
	var lines []string
	for _, n := range nodes {
		slices.Sort(names[n])
		for _, name := range names[n] {
			same := names[n]
			if isDir(n) {
				same = nil
			}
			lines = append(lines, fmt.Sprintf("%s %o %q %v", name, n.Mode&0o7777, s[n], same))
		}
	}
	slices.Sort(lines)
	return lines
}
