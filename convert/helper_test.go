package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// A memSink keeps the contents of small files.
type memSink map[*erofs.Node]string

func (m memSink) file(_ context.Context, n *erofs.Node, r io.Reader, size int64) error {
	p, err := io.ReadAll(io.LimitReader(r, size))
	m[n] = string(p)
	return err
}

// Short forms of tar entries.
func reg(name, content string) tarEntry {
	return tarEntry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}, content: content}
}

func dir(name string, mode int64) tarEntry {
	return tarEntry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, Uid: 7, ModTime: time.Unix(9, 0)}}
}

func sym(name, target string) tarEntry {
	return tarEntry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hard(name, target string) tarEntry {
	return tarEntry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

type tarEntry struct {
	tar.Header
	content string
}

func makeTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if e.ModTime.IsZero() && e.Typeflag != tar.TypeXGlobalHeader {
			e.ModTime = time.Unix(0, 0)
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatalf("%s: %v", e.Name, err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// overlay reads tars as layers, lowest first.
func overlay(tars ...[]byte) (*erofs.Node, memSink, error) {
	b, s, root := budget(defaultLimits), memSink{}, emptyDir()
	for i, p := range tars {
		l := newLayer(root, &b)
		if err := readTar(context.Background(), bytes.NewReader(p), l, s); err != nil {
			return nil, nil, fmt.Errorf("layer %d: %w", i, err)
		}
		var err error
		if root, err = l.merge(); err != nil {
			return nil, nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return root, s, nil
}

// list prints a tree, one line a path; a file with several names says the first.
func list(root *erofs.Node, s memSink) []string {
	var lines []string
	first := make(map[*erofs.Node]string)
	var walk func(name string, n *erofs.Node)
	walk = func(name string, n *erofs.Node) {
		line := fmt.Sprintf("%s %o %d:%d %d", name, n.Mode, n.UID, n.GID, n.Sec)
		if n.Nsec != 0 {
			line += fmt.Sprintf(".%09d", n.Nsec)
		}
		if n.Target != "" {
			line += " -> " + n.Target
		}
		if n.Major|n.Minor != 0 {
			line += fmt.Sprintf(" %d,%d", n.Major, n.Minor)
		}
		for _, x := range n.Xattrs {
			line += fmt.Sprintf(" %s=%q", x.Name, x.Value)
		}
		if c, ok := s[n]; ok {
			if len(c) > 20 {
				c = fmt.Sprintf("%d bytes", len(c))
			}
			line += " " + c
		}
		if f, ok := first[n]; ok {
			line += " = " + f
		} else if !isDir(n) {
			first[n] = name
		}
		lines = append(lines, line)
		names := make([]string, 0, len(n.Children))
		for c := range n.Children {
			names = append(names, c)
		}
		slices.Sort(names)
		for _, c := range names {
			walk(strings.TrimPrefix(name+"/"+c, "./"), n.Children[c])
		}
	}
	walk(".", root)
	return lines
}

func writeFile(t testing.TB, name string, p []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, p, 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}
