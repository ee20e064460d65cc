package daemon

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
)

// bootstrapTar makes a bootstrap layer of the given files.
func bootstrapTar(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for i := 0; i < len(files); i += 2 {
		h := &tar.Header{Name: files[i], Mode: 0o444, Size: int64(len(files[i+1])), Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(files[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUnpackBootstrap(t *testing.T) {
	d := &Daemon{o: Options{Root: t.TempDir()}}
	if err := os.Mkdir(filepath.Join(d.o.Root, "images"), 0o700); err != nil {
		t.Fatal(err)
	}
	good := bootstrapTar(t, "image/image.boot", "boot", "image/ab.blob.meta", "table", "image/backend.json", "{}")
	for name, tc := range map[string]struct {
		layer []byte
		want  string // of the error; "": none
	}{
		"good":         {good, ""},
		"old layout":   {bootstrapTar(t, "image.boot", "boot", "ab.blob.meta", "table"), ""},
		"no bootstrap": {bootstrapTar(t, "image/ab.blob.meta", "table"), "no image/image.boot"},
		"cut off":      {good[:len(good)/2], "EOF"},
		"not a tar":    {bytes.Repeat([]byte("x"), 1024), "tar"},
		"empty":        {nil, "no image/image.boot"},
	} {
		t.Run(name, func(t *testing.T) {
			src := &source{}
			err := d.unpackBootstrap(tc.layer, src)
			switch {
			case tc.want != "":
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got %v, want %q in it", err, tc.want)
				}
			case err != nil:
				t.Error(err)
			default:
				if p, err := os.ReadFile(src.boot); err != nil || string(p) != "boot" || string(src.tables["ab"]) != "table" {
					t.Errorf("got %q, %v, tables %q", p, err, src.tables)
				}
			}
		})
	}
	if left, _ := filepath.Glob(filepath.Join(d.o.Root, "images", partPattern)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
