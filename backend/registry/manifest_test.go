package registry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/backend/registry"
)

// put pushes a document under a tag ("" for its digest alone) and describes it.
func (w *world) put(tag, mediaType string, doc any) ocispec.Descriptor {
	w.t.Helper()
	body, err := json.Marshal(doc)
	if err != nil {
		w.t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	reference := w.host + "/" + repo + ":" + tag
	if tag == "" {
		reference = w.host + "/" + repo + "@" + d.Digest.String()
	}
	p, err := w.store.Pusher(reference)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := p.Manifest(w.t.Context(), d, body); err != nil {
		w.t.Fatal(err)
	}
	return d
}

// image is a manifest whose only layer has these bytes.
func (w *world) image(layer []byte) ocispec.Manifest {
	refs := w.push(layer, []byte("{}"))
	return ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: refs[1].Digest, Size: refs[1].Size},
		Layers: []ocispec.Descriptor{{
			MediaType: "application/vnd.oci.image.layer.nydus.blob.v1", Digest: refs[0].Digest, Size: refs[0].Size,
			Annotations: map[string]string{"containerd.io/snapshot/nydus-blob": "true"},
		}},
	}
}

func TestManifest(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	layer := backendtest.Bytes(1000, 1)
	want := w.image(layer)
	d := w.put("v1", want.MediaType, want)
	for _, reference := range []string{repo + ":v1", repo + "@" + d.Digest.String(), repo + ":v1@" + d.Digest.String()} {
		m, err := w.store.Manifest(t.Context(), w.host+"/"+reference)
		if err != nil {
			t.Fatal(err)
		}
		if m.Host != w.host || m.Repository != repo || m.Digest != d.Digest || m.Config.Digest != want.Config.Digest ||
			len(m.Layers) != 1 || m.Layers[0].Annotations["containerd.io/snapshot/nydus-blob"] != "true" {
			t.Errorf("%s: %+v", reference, m)
		}
		p, err := w.store.Fetch(t.Context(), m.Host, m.Repository, m.Layers[0], 1000)
		if err != nil || !bytes.Equal(p, layer) {
			t.Errorf("fetch: error %v, or wrong bytes", err)
		}
		if _, err := w.store.Fetch(t.Context(), m.Host, m.Repository, m.Layers[0], 999); err == nil {
			t.Error("a blob larger than the limit is fetched")
		}
	}
	// Without a tag it is latest.
	w.put("latest", want.MediaType, want)
	if m, err := w.store.Manifest(t.Context(), w.host+"/"+repo); err != nil || m.Digest != d.Digest {
		t.Errorf("no tag: %v, error %v", m.Digest, err)
	}
	for _, reference := range []string{w.host + "/" + repo + ":missing", w.host + "/other:v1", w.host + "/" + repo + "@" + digest.FromString("x").String()} {
		if _, err := w.store.Manifest(t.Context(), reference); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: error %v, want fs.ErrNotExist", reference, err)
		}
	}
	for _, reference := range []string{"", "demo", "host/", "host/Upper:v1", "host/../x:v1", "host/a:b:c", "host/a@sha256:1"} {
		if _, err := w.store.Manifest(t.Context(), reference); err == nil || !strings.Contains(err.Error(), "reference") {
			t.Errorf("%q: error %v", reference, err)
		}
	}
}

func TestIndex(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	linux := &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	nydusOS := &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH, OSFeatures: []string{"nydus.remoteimage.v1"}}
	nydusOther := &ocispec.Platform{OS: "linux", Architecture: "s390x", OSFeatures: []string{"nydus.remoteimage.v1"}}
	entry := func(seed uint64, p *ocispec.Platform, artifact string) ocispec.Descriptor {
		m := w.image(backendtest.Bytes(10, seed))
		d := w.put("", m.MediaType, m)
		d.Platform, d.ArtifactType = p, artifact
		return d
	}
	const artifact = "application/vnd.nydus.image.manifest.v1+json"
	windows := entry(1, &ocispec.Platform{OS: "windows", Architecture: runtime.GOARCH}, "")
	plain, plain2 := entry(2, linux, ""), entry(3, linux, "")
	byFeature, byArtifact, bare := entry(4, nydusOS, ""), entry(5, linux, artifact), entry(6, nil, artifact)
	foreign, unknown := entry(7, nydusOther, artifact), entry(8, nil, "")
	for _, c := range []struct {
		name    string
		entries []ocispec.Descriptor
		want    digest.Digest
	}{
		{"own platform", []ocispec.Descriptor{windows, unknown, plain, plain2}, plain.Digest},
		{"nydus by OS feature", []ocispec.Descriptor{plain, foreign, byFeature}, byFeature.Digest},
		{"nydus by artifact type", []ocispec.Descriptor{plain, foreign, byArtifact}, byArtifact.Digest},
		{"nydus without platform", []ocispec.Descriptor{foreign, plain, bare}, bare.Digest},
		{"nydus for another platform", []ocispec.Descriptor{foreign, plain}, plain.Digest},
		{"none", []ocispec.Descriptor{windows, unknown, foreign}, ""},
		{"empty", []ocispec.Descriptor{}, ""},
	} {
		w.put("index", ocispec.MediaTypeImageIndex, ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: c.entries,
		})
		m, err := w.store.Manifest(t.Context(), w.host+"/"+repo+":index")
		if m.Digest != c.want || (c.want == "") != errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: chose %s, error %v; want %s", c.name, m.Digest, err, c.want)
		}
	}
}

// TestBadManifest: whatever a registry sends, there is one clear error.
func TestBadManifest(t *testing.T) {
	w := newWorld(t, nil, registry.Options{Stall: 100 * time.Millisecond})
	good := w.image(backendtest.Bytes(10, 1))
	goodDigest := w.put("good", good.MediaType, good)
	blob := good.Layers[0].Digest
	answer := func(mediaType, body string, header ...string) backendtest.Action {
		return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header().Set("Content-Type", mediaType)
			for i := 0; i+1 < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			io.WriteString(w, body)
		}
	}
	oci, index := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	for _, c := range []struct {
		name   string
		action backendtest.Action
		text   string
	}{
		{"not JSON", answer(oci, "<html>"), "invalid character"},
		{"empty", answer(oci, ""), "unexpected end"},
		{"unknown type", answer("application/x", "{}"), "no image"},
		{"schema 1", answer("application/vnd.docker.distribution.manifest.v1+prettyjws", "{}"), "no image"},
		{"both at once", answer(oci, `{"manifests":[],"layers":[]}`), "malformed"},
		{"index with layers", answer(index, `{"manifests":[],"layers":[]}`), "malformed"},
		{"index without manifests", answer(index, `{}`), "malformed"},
		{"bad layer digest", answer(oci, `{"config":{"digest":"`+blob.String()+`"},"layers":[{"digest":"sha256:../../x"}]}`), "digest"},
		{"negative size", answer(oci, `{"config":{"digest":"`+blob.String()+`"},"layers":[{"size":-1,"digest":"`+blob.String()+`"}]}`), "size -1"},
		{"no config", answer(oci, `{"layers":[]}`), "digest"},
		{"bad entry digest", answer(index, fmt.Sprintf(`{"manifests":[{"digest":"../x","platform":{"os":"linux","architecture":%q}}]}`, runtime.GOARCH)), "digest"},
		{"other digest", answer(oci, "{}", "Docker-Content-Digest", digest.FromString("x").String()), "with digest"},
		{"malformed digest", answer(oci, "{}", "Docker-Content-Digest", "sha256:x"), "digest"},
		{"too large", answer(oci, strings.Repeat(" ", 4<<20)+"{}"), "larger than"},
		{"deep", answer(oci, `{"layers":`+strings.Repeat("[", 1<<20)), "manifest"},
		{"500", backendtest.Status(500), "500"},
		{"403", backendtest.Status(403), "check the login"},
		{"404", backendtest.Status(404), "404"},
		{"stall", backendtest.Stall(-1), "no progress"},
		{"wrong bytes", backendtest.WrongBytes, "with digest"},
	} {
		w.faults.Clear()
		w.faults.Add(backendtest.Path("/manifests/"), -1, c.action)
		m, err := w.store.Manifest(t.Context(), w.host+"/"+repo+":good")
		if err == nil || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "%!") {
			t.Errorf("%s: %+v, error %v", c.name, m, err)
		}
	}
	// By digest not one byte may differ, whatever the registry says about it.
	w.faults.Clear()
	w.faults.Add(backendtest.Path("/manifests/"), -1, answer(oci, "{}", "Docker-Content-Digest", goodDigest.Digest.String()))
	if _, err := w.store.Manifest(t.Context(), w.host+"/"+repo+"@"+goodDigest.Digest.String()); err == nil || !strings.Contains(err.Error(), "with digest") {
		t.Errorf("wrong bytes for a digest: error %v", err)
	}
	// What passes is tried again.
	w.faults.Clear()
	w.faults.Add(backendtest.Path("/manifests/"), 2, backendtest.Status(503))
	if _, err := w.store.Manifest(t.Context(), w.host+"/"+repo+":good"); err != nil {
		t.Errorf("two 503: error %v", err)
	}
}

func TestFetchVerifies(t *testing.T) {
	w := newWorld(t, nil, registry.Options{})
	data := backendtest.Bytes(9<<20, 1)
	ref := w.push(data)[0]
	fetch := func(size int64) ([]byte, error) {
		return w.store.Fetch(t.Context(), w.host, repo, ocispec.Descriptor{Digest: ref.Digest, Size: size}, 10<<20)
	}
	w.faults.Add(backendtest.BlobReads, 1, backendtest.Reset(100))
	for _, size := range []int64{ref.Size, 0} {
		if p, err := fetch(size); err != nil || !bytes.Equal(p, data) {
			t.Errorf("size %d: error %v, or wrong bytes", size, err)
		}
	}
	for _, size := range []int64{ref.Size - 1, ref.Size + 1, -1} {
		if _, err := fetch(size); err == nil {
			t.Errorf("fetched as %d bytes", size)
		}
	}
	w.faults.Add(backendtest.BlobReads, 1, backendtest.WrongBytes)
	if _, err := fetch(ref.Size); err == nil || !strings.Contains(err.Error(), "with digest") {
		t.Errorf("wrong bytes: error %v", err)
	}
}

func TestPush(t *testing.T) {
	w := newWorld(t, basicAuth, registry.Options{Credential: login})
	data := backendtest.Bytes(100_000, 1)
	d := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(data), Size: int64(len(data))}
	p, err := w.store.Pusher(w.host + "/" + repo + ":v1")
	if err != nil {
		t.Fatal(err)
	}
	opened := 0
	open := func() (io.ReadCloser, error) {
		opened++
		return io.NopCloser(bytes.NewReader(data)), nil
	}
	w.faults.Add(func(r *http.Request) bool { return r.Method == http.MethodPut }, 1, backendtest.Status(502))
	if err := p.Blob(t.Context(), d, open); err != nil || opened != 2 {
		t.Errorf("with one 502: error %v, source opened %d times", err, opened)
	}
	if err := p.Blob(t.Context(), d, open); err != nil || opened != 2 {
		t.Errorf("what is there: error %v, source opened %d times", err, opened)
	}

	other := d
	other.Digest = digest.FromString("other")
	for name, source := range map[string]func() (io.ReadCloser, error){
		"wrong bytes": open,
		"no source":   func() (io.ReadCloser, error) { return nil, os.ErrNotExist },
		"short":       func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data[1:])), nil },
		"broken": func() (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(data[:10]), brokenReader{})), nil
		},
	} {
		if err := p.Blob(t.Context(), other, source); err == nil {
			t.Errorf("%s: pushed", name)
		} else {
			w.secrets(err)
		}
	}
	w.faults.Add(func(r *http.Request) bool { return r.Method == http.MethodPost }, 1,
		backendtest.Status(http.StatusAccepted, "Location", "http://127.0.0.1:1/upload?X-Sig="+backendtest.Signature))
	err = p.Blob(t.Context(), other, open)
	if err == nil || backend.Temporary(err) {
		t.Errorf("upload to another host: error %v", err)
	}
	w.secrets(err)

	body := []byte(`{}`)
	m := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(body), Size: 2}
	w.faults.Add(func(r *http.Request) bool { return r.Method == http.MethodPut }, 1, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"errors":[{"code":"MANIFEST_INVALID","message":"hunter2"}]}`)
	})
	err = p.Manifest(t.Context(), m, body)
	if err == nil || !strings.Contains(err.Error(), "400 Bad Request (MANIFEST_INVALID)") {
		t.Errorf("refused manifest: error %v", err)
	}
	w.secrets(err)
	if err := p.Manifest(t.Context(), m, body); err != nil {
		t.Errorf("manifest: %v", err)
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("disk on fire") }
