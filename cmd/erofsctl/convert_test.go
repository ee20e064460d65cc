package main

import (
	"bytes"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/erofsd/erofsd/convert"
)

func TestIsReference(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.MkdirAll("host/there:tag", 0o755); err != nil {
		t.Fatal(err)
	}
	for dest, want := range map[string]bool{
		"localhost:5000/a/b:tag": true, "registry.example/a:latest": true, "127.0.0.1:1/x:y": true,
		"host/missing:tag": true, "host/there:tag": false,
		"image": false, "image/out": false, "/srv/a:b": false, "./host/a:b": false, "../a:b": false,
		"localhost:5000/a": false, "a:b": false, "": false,
	} {
		if got := isReference(dest); got != want {
			t.Errorf("isReference(%q) = %t", dest, got)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]uint32{"4096": 4096, "256KiB": 256 << 10, "1MiB": 1 << 20, "64k": 64 << 10, "16M": 16 << 20} {
		if got, err := parseSize(s); got != want || err != nil {
			t.Errorf("parseSize(%q) = %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "KiB", "-1", "1GiB", "1.5MiB", "4294967296", "4294967295MiB", "2049MiB", "x"} {
		if n, err := parseSize(s); err == nil || !strings.Contains(err.Error(), "write it like") {
			t.Errorf("parseSize(%q) = %d, %v", s, n, err)
		}
	}
}

// runCLI runs erofsctl with args and returns what it printed.
func runCLI(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	c := command()
	c.Writer, c.ErrWriter = &out, &errs
	err = c.Run(t.Context(), append([]string{"erofsctl"}, args...))
	return out.String(), errs.String(), err
}

func TestConvertCommand(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	if err := os.MkdirAll(src, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "f"), bytes.Repeat([]byte("text "), 100000), 0o644); err != nil {
		t.Fatal(err)
	}
	dest := filepath.Join(t.TempDir(), "image")
	out, errs, err := runCLI(t, "convert", "--chunk-size", "64KiB", src, dest)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out, "488.3 KiB in, ") || !strings.Contains(out, " out, ratio ") || !strings.Contains(out, ", 1 files, ") || !strings.HasSuffix(out, " s\n") {
		t.Errorf("printed %q", out)
	}
	if errs != "read 1/1 src 488.3 KiB\n" {
		t.Errorf("progress %q", errs)
	}
	if _, err := os.Stat(filepath.Join(dest, "image.boot")); err != nil {
		t.Error(err)
	}

	server := httptest.NewServer(registry.New())
	defer server.Close()
	ref := strings.TrimPrefix(server.URL, "http://") + "/test/image:1"
	out, errs, err = runCLI(t, "convert", "--plain-http", src, ref)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, "sha256:") || strings.Count(errs, "\n") != 3 {
		t.Errorf("printed %q and %q", out, errs)
	}

	for want, args := range map[string][]string{
		"two arguments": {"convert", src},
		"--chunk-size":  {"convert", "--chunk-size", "many", src, dest},
		"powers of two": {"convert", "--chunk-size", "5000", src, dest},
		"no such file":  {"convert", filepath.Join(src, "missing"), dest},
		"lz4_block":     {"convert", "--compressor", "xz", src, dest},
	} {
		if _, _, err := runCLI(t, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v, want %q", args, err, want)
		}
	}
}

func TestProgressOnTerminal(t *testing.T) {
	var b bytes.Buffer
	p := &progress{w: &b, terminal: true}
	p.event(convert.Event{Stage: convert.StageRead, Name: "layer", Layer: 1, Layers: 2, Done: 512, Total: 1024})
	p.event(convert.Event{Stage: convert.StageRead, Name: "layer", Layer: 1, Layers: 2, Done: 600, Total: 1024}) // too soon
	p.event(convert.Event{Stage: convert.StageRead, Name: "layer", Layer: 1, Layers: 2, Done: 1024, Total: 1024, End: true})
	p.done()
	want := "\rread 1/2 layer 512 B of 1.0 KiB [##########..........]" +
		"\rread 1/2 layer 1.0 KiB of 1.0 KiB [####################]"
	if got := b.String(); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, " \r") {
		t.Errorf("drew %q", got)
	}
}
