package snapshotter

import (
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// FuzzLabels decides about a layer with any labels: only one that is being unpacked stays
// remote or is an image's metadata; the reason is told for each, in bounded words; a commit
// changes nothing that the client says then, and keeps what decided.
func FuzzLabels(f *testing.F) {
	for _, text := range []string{
		`{}`, `{"containerd.io/snapshot.ref":"sha256:a","containerd.io/snapshot/nydus-blob":"true"}`,
		`{"containerd.io/snapshot/nydus-bootstrap":"true","containerd.io/snapshot/cri.image-ref":"registry.example/app:1"}`,
		`{"containerd.io/snapshot.ref":"","containerd.io/snapshot/nydus-fs-version":"5","containerd.io/snapshot/remote/stargz.reference":"x"}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var labels map[string]string
		if json.Unmarshal(text, &labels) != nil {
			t.Skip()
		}
		before := maps.Clone(labels)
		kind, target := kindOf(labels), labels[labelTarget]
		if kind != otherLayer && target == "" {
			t.Errorf("a snapshot without a target is of kind %d", kind)
		}
		what, why := decision(labels)
		if want := map[layerKind]string{otherLayer: unpacked, dataLayer: remote, bootstrapLayer: bootstrap}[kind]; what != want || why == "" || len(why) > 400 {
			t.Errorf("kind %d is told as %s: %q", kind, what, why)
		}
		for name, v := range inputs(labels) {
			if len(v) > maxLabel || !strings.HasPrefix(labels[name], v) {
				t.Errorf("%s is told as %q", name, v)
			}
		}
		if err := checkVersion(labels); err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("version: %v", err)
		}
		if r := referenceIn(labels); r != "" && r != labels[labelReference] && r != labels[labelStargz] || len(r) > maxReference {
			t.Errorf("reference %q", r)
		}
		if err := errors.Join(checkReference(labels), checkTarget(labels)); err != nil && (!errdefs.IsInvalidArgument(err) || len(err.Error()) > 1000) {
			t.Errorf("too long: %v", err)
		}
		said := snapshots.Info{Labels: map[string]string{labelTarget: "said", "other": "said"}}
		if err := asPrepared(labels)(&said); err != nil {
			t.Fatal(err)
		}
		if said.Labels[labelTarget] != "said" || said.Labels["other"] != "said" || (said.Labels[labelBootstrap] == "true") != (kind == bootstrapLayer) {
			t.Errorf("committed with %q", said.Labels)
		}
		for _, update := range []map[string]string{nil, {labelBootstrap: "true"}, {labelBlob: "true", labelTarget: "x"}} {
			if got := kindOf(withDecision(update, labels)); got != kind {
				t.Errorf("an update by %q makes kind %d of %d", update, got, kind)
			}
		}
		if !maps.Equal(before, labels) {
			t.Error("the labels were changed")
		}
	})
}

// FuzzMapping takes only what is numbers: the text becomes a mount option.
func FuzzMapping(f *testing.F) {
	for _, text := range []string{"0:1000:65536", "1:2:3,0:5:1", "0:0:1,lowerdir=/", "0:4294967295:1", "::", "-1:0:1", "0:0:0"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		uid, gid, err := mappedRoot(map[string]string{labelUIDMapping: text})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || len(err.Error()) > 1000 {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if uid < 0 || uid >= math.MaxUint32 || gid != 0 {
			t.Errorf("%q maps root to %d, %d", text, uid, gid)
		}
		if strings.Trim(text, "0123456789:,") != "" {
			t.Errorf("%q is accepted", text)
		}
	})
}

// TestMappedRoot takes the first range with root, wherever it is.
func TestMappedRoot(t *testing.T) {
	for text, want := range map[string]int{"0:1000:1,0:2000:1": 1000, "1:5:1,0:7:2,9:9:9": 7} {
		if uid, _, err := mappedRoot(map[string]string{labelUIDMapping: text}); err != nil || uid != want {
			t.Errorf("%s maps root to %d, %v; want %d", text, uid, err, want)
		}
	}
}

// FuzzRecord reads any file as a record: it is one with an image, or an error that names it,
// and what was read is the same when it was written.
func FuzzRecord(f *testing.F) {
	for _, text := range []string{`{"image":"abc","domain":"d","reference":"registry.example/app:1"}`, `{}`, `{"image":""}`, `[`, `{"image":"a"}{"image":"b"}`, "null"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		name := filepath.Join(dir, recordFile)
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := readRecord(dir)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), name) {
				t.Errorf("error %v", err)
			}
			return
		}
		if r.Image == "" || r.name() == "" {
			t.Errorf("record %+v", r)
		}
		if err := r.write(dir); err != nil {
			t.Fatal(err)
		}
		if again, err := readRecord(dir); err != nil && !r.tooLong() || err == nil && again != r {
			t.Errorf("%+v was written and is %+v, %v", r, again, err)
		}
		if got := names(t, dir); !slices.Equal(got, []string{recordFile}) {
			t.Errorf("files %q are left", got)
		}
	})
}

// tooLong reports whether r takes more room than a record has: escapes make it longer.
func (r record) tooLong() bool {
	text, err := json.Marshal(r)
	return err != nil || len(text) > maxRecord
}

// FuzzReference remembers wishes by any reference, and gives each back once.
func FuzzReference(f *testing.F) {
	f.Add("registry.example/app:1", "registry.example/app:2")
	f.Add("", "x")
	f.Add("same", "same")
	f.Fuzz(func(t *testing.T, a, b string) {
		var w wishes
		w.put(a, []string{"/a"})
		w.put(b, []string{"/b"})
		want := "/a"
		if a == b {
			want = "/b"
		}
		if got := w.take(a); len(got) != 1 || got[0] != want {
			t.Errorf("of %q: %q, want %s", a, got, want)
		}
		if got := w.take(b); (len(got) == 0) != (a == b) {
			t.Errorf("of %q: %q", b, got)
		}
		if len(w.files)+len(w.order) != 0 {
			t.Errorf("%d and %d are left", len(w.files), len(w.order))
		}
		c := committed{Info: snapshots.Info{Name: "ns/1/" + a, Labels: map[string]string{labelTarget: b}}}
		if c.is("") || b != "" && !c.is(b) || a != "" && !c.is(a) {
			t.Errorf("a layer called %q with the target %q is not found", a, b)
		}
	})
}
