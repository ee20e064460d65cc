package snapshotter

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// ordinary commits a layer of an ordinary image as containerd does.
func ordinary(t *testing.T, r *lazyRig, chainID, parent string, more ...string) {
	t.Helper()
	opt := with(chainID, more...)
	if _, err := r.Prepare(t.Context(), "extract "+chainID, parent, opt); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(t.Context(), "ns/1/"+chainID, "extract "+chainID, opt); err != nil {
		t.Fatal(err)
	}
}

// TestExplain says of each image, in each state, why it is served as it is.
func TestExplain(t *testing.T) {
	var log bytes.Buffer
	r := newLazy(t, WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	const nydus, plain = "registry.example/nydus:1", "registry.example/plain:1"
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "x"), labelReference, nydus)
	ordinary(t, r, "sha256:low", "", labelReference, plain)
	ordinary(t, r, "sha256:high", "ns/1/sha256:low", labelReference, plain, labelBlob, "yes")
	if _, err := r.Prepare(t.Context(), "unpacked by hand", ""); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(t.Context(), "ns/2/sha256:hand", "unpacked by hand", snapshots.WithLabels(map[string]string{labelReference: "registry.example/hand:1"})); err != nil {
		t.Fatal(err)
	}
	check := func(reference string, chains []string, name, state, why string, decisions ...string) {
		t.Helper()
		list, err := r.Explain(t.Context(), reference, chains)
		if err != nil || len(list) != 1 {
			t.Fatalf("%s: %+v, %v", reference, list, err)
		}
		e := list[0]
		var got []string
		for _, l := range e.Layers {
			got = append(got, l.Decision)
			if l.Why == "" {
				t.Errorf("%s: nobody knows why %s", reference, l.Snapshot)
			}
		}
		if e.Name != name || e.State != state || e.Lazy != (state != unpacked) || !strings.Contains(e.Why, why) || !slices.Equal(got, decisions) {
			t.Errorf("%s: %+v, layers %q; want %s, %s, %q, %q", reference, e, got, name, state, why, decisions)
		}
	}
	check(nydus, nil, top, "idle", "when a container wants it", bootstrap, remote)
	r.daemon.setDown(errors.New("it has a cold"))
	if _, err := r.Prepare(t.Context(), "a", top); err == nil {
		t.Fatal("a container without a daemon")
	}
	check(nydus, nil, top, "failed", "it has a cold", bootstrap, remote)
	r.daemon.setDown(nil)
	for key, parent := range map[string]string{"a": top, "b": "ns/1/sha256:high"} {
		if _, err := r.Prepare(t.Context(), key, parent); err != nil {
			t.Fatal(err)
		}
	}
	check(nydus, nil, top, "mounted", "erofsd has it mounted", bootstrap, remote)
	check(plain, nil, "ns/1/sha256:high", unpacked, `is "yes", not "true"`, unpacked, unpacked)
	check("tagged/later:1", []string{"sha256:low"}, "ns/1/sha256:low", unpacked, "no annotation of a nydus image", unpacked)
	check("registry.example/hand:1", nil, "ns/2/sha256:hand", unpacked, "without "+labelTarget, unpacked)
	const broken = "registry.example/broken:1"
	half := with("sha256:half", labelBlob, "true", labelReference, broken)
	if _, err := r.Prepare(t.Context(), "extract half", "", half); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	check(broken, nil, "sha256:half", unpacked, "metadata is not here yet", remote)
	if list, err := r.Explain(t.Context(), "", nil); err != nil || len(list) != 4 {
		t.Errorf("all: %+v, %v", list, err)
	}
	if list, err := r.Explain(t.Context(), "nobody/has:1", []string{""}); err != nil || list == nil || len(list) != 0 {
		t.Errorf("none: %+v, %v", list, err)
	}
	for _, want := range []string{"image is not served\"", "it has a cold", "image is served lazily", "image is not served lazily", nydus, plain} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not have %s:\n%s", want, log.String())
		}
	}
}
