package snapshotter

import (
	"context"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// TestUpdateLazy changes labels of lazy snapshots in every way: those that anybody may set
// change, and what the snapshot is does not. Then containerd finds it as before.
func TestUpdateLazy(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "not the bootstrap's directory"))
	update := func(name string, labels map[string]string, fields ...string) {
		t.Helper()
		before, err := r.Stat(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		info, err := r.Update(t.Context(), snapshots.Info{Name: name, Labels: labels}, fields...)
		if err != nil {
			t.Fatal(err)
		}
		for _, label := range deciding() {
			if info.Labels[label] != before.Labels[label] {
				t.Errorf("update of %s by %v (%v): %s was %q and is %q", name, labels, fields, label, before.Labels[label], info.Labels[label])
			}
		}
		if info.Labels["mine"] != labels["mine"] || !info.Updated.After(before.Updated) {
			t.Errorf("update of %s by %v (%v) gives %+v", name, labels, fields, info)
		}
	}
	update(top, map[string]string{"mine": "1"}, "labels.mine")
	update(top, map[string]string{"mine": "2"}, "labels")
	update(top, nil)
	update(top, map[string]string{labelBootstrap: "", labelBlob: "true"}, "labels."+labelBootstrap, "labels."+labelBlob)
	update("sha256:data-1", nil)
	layer(t, r.Snapshotter, "ordinary", "")
	update("ordinary", map[string]string{labelBootstrap: "true", labelTarget: "sha256:another"})
	if _, err := r.Update(t.Context(), snapshots.Info{Name: top}, "kind"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("update of the kind: %v", err)
	}
	if _, err := r.Update(t.Context(), snapshots.Info{Name: "none"}); !errdefs.IsNotFound(err) {
		t.Errorf("update of nothing: %v", err)
	}
	m, err := r.Prepare(t.Context(), "c", top)
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readIn(t, m); text != "not the bootstrap's directory" {
		t.Errorf("the container reads %q", text)
	}
	for filter, want := range map[string][]string{
		`labels."containerd.io/snapshot.ref"==` + top + `,parent==sha256:data-1`: {top},
		`labels."containerd.io/snapshot.ref"==` + top + `,parent==another`:       nil,
		`labels."containerd.io/snapshot.ref"==sha256:another`:                    nil,
		`kind==active`:                         {"c"},
		`name==` + top:                         {top},
		`labels."` + labelBlob + `"==true`:     {"sha256:data-1"},
		`parent==` + top + `,kind==active`:     {"c"},
		`labels."` + labelTarget + `"~=sha256`: {top, "sha256:data-1"},
	} {
		var got []string
		err := r.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error { got = append(got, i.Name); return nil }, filter)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s finds %q, %v; want %q", filter, got, err, want)
		}
	}
	if err := r.Walk(t.Context(), nil, "what is this"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a filter that is none: %v", err)
	}
}

// TestCommitSaysOtherwise has the client say at a commit that a layer is something else than
// what was prepared.
func TestCommitSaysOtherwise(t *testing.T) {
	r := newLazy(t)
	lies := snapshots.WithLabels(map[string]string{labelBootstrap: "true", labelBlob: "true"})
	prepare(t, r.Snapshotter, "extract", "", with("sha256:ordinary"))
	if err := r.Commit(t.Context(), "sha256:ordinary", "extract", lies); err != nil {
		t.Fatal(err)
	}
	if m := prepare(t, r.Snapshotter, "c", "sha256:ordinary"); m.Type != "overlay" {
		t.Errorf("a container of an ordinary layer gets %+v", m)
	}
	// A pod's annotations get to the snapshot of its container, and of that somebody makes an image.
	prepare(t, r.Snapshotter, "pod", "", lies)
	if err := r.Commit(t.Context(), "sha256:pod", "pod", lies); err != nil {
		t.Fatal(err)
	}
	if m := prepare(t, r.Snapshotter, "d", "sha256:pod"); m.Type != "overlay" {
		t.Errorf("a container of what a pod has left gets %+v", m)
	}
}
