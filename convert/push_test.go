package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A registry is a Destination that remembers the order of things.
type fakeRegistry struct {
	objects  map[digest.Digest][]byte
	order    []string // media types
	manifest []byte
	fail     int // the call that fails, 1-based; 0: none
	err      error
}

func (r *fakeRegistry) call(mediaType string) error {
	r.order = append(r.order, mediaType)
	if r.fail == len(r.order) {
		return r.err
	}
	return nil
}

func (r *fakeRegistry) Blob(_ context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	if err := r.call(d.MediaType); err != nil {
		return err
	}
	f, err := open()
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	if int64(len(p)) != d.Size || digest.FromBytes(p) != d.Digest {
		return errors.New("not what the descriptor says")
	}
	if r.objects == nil {
		r.objects = make(map[digest.Digest][]byte)
	}
	r.objects[d.Digest] = p
	return nil
}

func (r *fakeRegistry) Manifest(_ context.Context, d ocispec.Descriptor, body []byte) error {
	r.manifest = body
	return r.call(d.MediaType)
}

func TestPush(t *testing.T) {
	config := map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": "2020-01-02T03:04:05Z",
		"config":  map[string]any{"Env": []string{"A=b"}, "Cmd": []string{"sh"}, "Healthcheck": map[string]any{"Test": []string{"NONE"}}},
		"history": []map[string]any{{"created_by": "one"}, {"created_by": "env", "empty_layer": true}, {"created_by": "two"}, {"created_by": "three"}},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{"x", "y", "z"}},
	}
	src := makeLayout(t, config, makeTar(t, reg("a", "1")), makeTar(t, dir("d", 0o700)), gzipOf(t, makeTar(t, reg("b", "2"))))
	var regs []*fakeRegistry
	for range 2 {
		temp := t.TempDir()
		reg := &fakeRegistry{}
		r, err := Convert(t.Context(), src, reg, Options{TempDir: temp})
		if err != nil {
			t.Fatal(err)
		}
		if r.Digest != digest.FromBytes(reg.manifest) {
			t.Errorf("result says manifest %s", r.Digest)
		}
		if left, _ := os.ReadDir(temp); len(left) > 0 {
			t.Errorf("%d files left in TempDir", len(left))
		}
		regs = append(regs, reg)
	}
	if !bytes.Equal(regs[0].manifest, regs[1].manifest) {
		t.Error("manifests of the same source differ")
	}
	r := regs[0]
	wantOrder := []string{mediaTypeBlob, mediaTypeBlob, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageManifest}
	if diff := cmp.Diff(wantOrder, r.order); diff != "" {
		t.Error(diff)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(r.manifest, &m); err != nil {
		t.Fatal(err)
	}
	boot := m.Layers[2]
	if diff := cmp.Diff(map[string]string{annotationBootstrap: "true", annotationVersion: "6"}, boot.Annotations); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{annotationBlob: "true"}, m.Layers[0].Annotations); diff != "" {
		t.Error(diff)
	}
	checkConfig(t, r, m, config)
	checkBootstrapLayer(t, r, m)
}

func checkConfig(t *testing.T, r *fakeRegistry, m ocispec.Manifest, source map[string]any) {
	t.Helper()
	var got struct {
		Created string         `json:"created"`
		Config  map[string]any `json:"config"`
		RootFS  ocispec.RootFS `json:"rootfs"`
		History []ocispec.History
	}
	if err := json.Unmarshal(r.objects[m.Config.Digest], &got); err != nil {
		t.Fatal(err)
	}
	var want map[string]any
	if err := json.Unmarshal(toJSON(t, source["config"]), &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got.Config); diff != "" || got.Created != source["created"] {
		t.Errorf("config is not the source's: %s, created %s", diff, got.Created)
	}
	z, err := gzip.NewReader(bytes.NewReader(r.objects[m.Layers[2].Digest]))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]digest.Digest{m.Layers[0].Digest, m.Layers[1].Digest, digest.FromBytes(plain)}, got.RootFS.DiffIDs); diff != "" {
		t.Error(diff)
	}
	var history []string
	for _, h := range got.History {
		history = append(history, fmt.Sprint(h.CreatedBy, h.EmptyLayer))
	}
	if diff := cmp.Diff([]string{"onefalse", "envtrue", "twotrue", "threefalse", "erofsctl convertfalse"}, history); diff != "" {
		t.Error(diff)
	}
}

func checkBootstrapLayer(t *testing.T, r *fakeRegistry, m ocispec.Manifest) {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(r.objects[m.Layers[2].Digest]))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var names []string
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprintf("%s %o %d", h.Name, h.Mode, h.ModTime.Unix()))
		if h.Typeflag == tar.TypeReg {
			p, err := io.ReadAll(tr)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, filepath.Base(h.Name)), p)
		}
	}
	want := []string{"image/ 755 0", "image/image.boot 444 0"}
	for _, l := range m.Layers[:2] {
		want = append(want, "image/"+l.Digest.Encoded()+".blob.meta 444 0")
		writeFile(t, filepath.Join(dir, blobsName, l.Digest.Encoded()), r.objects[l.Digest])
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error(diff)
	}
	tree := openDir(t, dir).tree(t)
	if len(tree) != 4 || tree["b"].Size != 1 {
		t.Errorf("image holds %v", tree)
	}
}

// TestPushFails makes each request fail in turn: the manifest must not be
// there, nothing may be left in TempDir.
func TestPushFails(t *testing.T) {
	src := filepath.Join(t.TempDir(), "x.tar")
	writeFile(t, src, makeTar(t, reg("a", "1")))
	full := errors.New("disk full")
	for n := 1; n <= 4; n++ {
		temp := t.TempDir()
		r := &fakeRegistry{fail: n, err: full}
		if _, err := Convert(t.Context(), src, r, Options{TempDir: temp}); !errors.Is(err, full) {
			t.Errorf("request %d: error %v", n, err)
		}
		if r.manifest != nil && n < 4 {
			t.Errorf("request %d failed and there is a manifest", n)
		}
		if left, _ := os.ReadDir(temp); len(left) > 0 {
			t.Errorf("request %d: %d files left", n, len(left))
		}
	}
}

func TestProgress(t *testing.T) {
	p := makeTar(t, reg("a", strings.Repeat("x", 1<<20)))
	src := writeFile(t, filepath.Join(t.TempDir(), "t"), p)
	var ends []string
	var last Event
	o := Options{TempDir: t.TempDir(), Progress: func(e Event) {
		if e.Stage == last.Stage && e.Layer == last.Layer && e.Done < last.Done {
			t.Errorf("from %d back to %d", last.Done, e.Done)
		}
		if e.End {
			ends = append(ends, fmt.Sprintf("%s %d/%d %t", e.Stage, e.Layer, e.Layers, e.Done == e.Total))
		}
		last = e
	}}
	if _, err := Convert(t.Context(), src, &fakeRegistry{}, o); err != nil {
		t.Fatal(err)
	}
	if want := []string{"read 1/1 true", "push 1/2 true", "push 2/2 true"}; !slices.Equal(ends, want) {
		t.Errorf("ends %q", ends)
	}
}
