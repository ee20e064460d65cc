package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/urfave/cli/v3"

	"github.com/erofsd/erofsd/internal/testenv"
)

// runSub runs one command and returns what it printed and its exit code.
func runSub(t *testing.T, sub *cli.Command, args ...string) (out string, code int, err error) {
	t.Helper()
	var w bytes.Buffer
	root := &cli.Command{
		Name: "erofsctl", Commands: []*cli.Command{sub}, Writer: &w, ErrWriter: &w,
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
	}
	err = root.Run(t.Context(), append([]string{"erofsctl", sub.Name}, args...))
	if exit := cli.ExitCoder(nil); errors.As(err, &exit) {
		return w.String(), exit.ExitCode(), nil
	}
	return w.String(), 0, err
}

func TestCheckFixtures(t *testing.T) {
	dir := testenv.Fixtures(t)
	for _, name := range []string{"zstd", "lz4", "none", "sha256-64k", "batch", "layered"} {
		boot := filepath.Join(dir, name, "image.boot")
		out, code, err := runSub(t, checkCommand(), "--bootstrap", boot, "--blob-dir", filepath.Join(dir, name, "blobs"))
		if err != nil || code != 0 || strings.Count(out, "\n") != 1 || !strings.Contains(out, ": ok;") || strings.Contains(out, " 0 stored") {
			t.Errorf("%s: %v, exit code %d\n%s", name, err, code, out)
		}
	}
}

func TestCheckDamaged(t *testing.T) {
	src := filepath.Join(testenv.Fixtures(t), "zstd")
	boot, err := os.ReadFile(filepath.Join(src, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(filepath.Join(src, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	id := names[0].Name()
	blob, err := os.ReadFile(filepath.Join(src, "blobs", id))
	if err != nil {
		t.Fatal(err)
	}
	flip := func(p []byte, at ...int) []byte {
		p = bytes.Clone(p)
		for _, i := range at {
			p[i] ^= 0x10
		}
		return p
	}
	for _, c := range []struct {
		name       string
		boot, blob []byte
		lines      int
		want       string
	}{
		{"two chunks", boot, flip(blob, 100, 2_000_000), 2, "blob " + id + ": chunks"},
		{"short blob", boot, blob[:1<<20], 1, "it ends at"},
		{"no blob", boot, nil, 1, "is not in"},
		{"device too small", flip(boot, 1408+64), blob, 1, "metadata: blob 0: cache file"},
		{"not an image", boot[:1000], blob, 1, "too few"},
		{"magic", flip(boot, 1024), blob, 1, "magic"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "image.boot")
			if err := os.WriteFile(file, c.boot, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.blob != nil {
				if err := os.WriteFile(filepath.Join(dir, id), c.blob, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			out, code, err := runSub(t, checkCommand(), "--bootstrap", file, "--blob-dir", dir)
			if err != nil || code != 1 {
				t.Errorf("%v, exit code %d", err, code)
			}
			if n := strings.Count(out, "\n") - 1; n < c.lines || !strings.Contains(out, c.want) || strings.Contains(out, ": ok;") {
				t.Errorf("%d lines before the last one, want %d and %q:\n%s", n, c.lines, c.want, out)
			}
		})
	}
	if _, _, err := runSub(t, checkCommand(), "--bootstrap", src+"/no"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no bootstrap: %v", err)
	}
}

func TestInspect(t *testing.T) {
	boot := filepath.Join(testenv.Fixtures(t), "layered", "image.boot")
	for _, c := range []struct {
		path string
		want []string
	}{
		{"", []string{"chunk size      1048576", "device 3", "zstd, digests blake3", "1629 of at most 1048576 bytes, 1624 of them"}},
		{"big/text-3m", []string{"mode      100644", "OFFSET", "3145728  123"}},
		{"/", []string{"NAME", `"big"`}},
	} {
		args := []string{boot}
		if c.path != "" {
			args = append(args, c.path)
		}
		out, _, err := runSub(t, inspectCommand(), args...)
		if err != nil {
			t.Errorf("%q: %v", c.path, err)
		}
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%q: no %q in\n%s", c.path, want, out)
			}
		}
	}
	if _, _, err := runSub(t, inspectCommand(), boot, "no/such"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing path: %v", err)
	}
	if _, _, err := runSub(t, inspectCommand()); err == nil {
		t.Error("no argument: no error")
	}
}
