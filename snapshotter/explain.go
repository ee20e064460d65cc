package snapshotter

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/erofsd/erofsd/internal/api"
)

// Decisions about a layer, as people are told them.
const (
	remote    = "remote"
	bootstrap = "bootstrap"
	unpacked  = "unpacked"
)

// decision says what was done with a layer that has these labels, and why.
func decision(labels map[string]string) (what, why string) {
	switch kindOf(labels) {
	case bootstrapLayer:
		return bootstrap, "it has the image's metadata (" + labelBootstrap + "): it is unpacked, and erofsd mounts the image"
	case dataLayer:
		return remote, "it has data (" + labelBlob + "): what is read of it is fetched"
	}
	if labels[labelTarget] == "" {
		return unpacked, "it came without " + labelTarget + ": who pulled it unpacks everything"
	}
	for _, name := range []string{labelBootstrap, labelBlob} {
		if v, ok := labels[name]; ok {
			return unpacked, fmt.Sprintf("its %s is %.20q, not \"true\"", name, v)
		}
	}
	if _, ok := labels[labelTOC]; ok {
		return unpacked, "it is eStargz (" + labelTOC + "), which is unpacked as any ordinary layer"
	}
	return unpacked, "it has no annotation of a nydus image (" + labelBootstrap + ", " + labelBlob + ")"
}

// maxLabel bounds a label that is told.
const maxLabel = 256

// inputs are the labels that decide.
func inputs(labels map[string]string) map[string]string {
	told := map[string]string{}
	for _, name := range []string{labelTarget, labelBlob, labelBootstrap, labelVersion, labelReference, labelStargz} {
		if v, ok := labels[name]; ok {
			told[name] = v[:min(len(v), maxLabel)]
		}
	}
	return told
}

// A committed is a committed snapshot.
type committed struct {
	snapshots.Info
	id     string
	parent bool // of another one
}

// Explain says of the images that were pulled by a reference, or whose uppermost layers have
// one of the chain ids, why they are served lazily or not. Without a reference it is about
// all images. It does not ask the daemon.
func (s *Snapshotter) Explain(ctx context.Context, reference string, chainIDs []string) ([]api.Explanation, error) {
	all, err := s.committed(ctx)
	if err != nil {
		return nil, fmt.Errorf("explain image %.200q: %w", reference, err)
	}
	images, err := s.Images(ctx)
	if err != nil {
		return nil, fmt.Errorf("explain image %.200q: %w", reference, err)
	}
	lazy := map[string]Image{}
	for _, i := range images {
		lazy[i.Snapshot] = i
	}
	list := []api.Explanation{}
	for _, top := range all {
		whole := !top.parent || top.Labels[labelBootstrap] == "true"
		asked := slices.ContainsFunc(chainIDs, top.is)
		if !whole && !asked {
			continue
		}
		e := explain(all, lazy, top)
		if reference == "" && whole || asked || e.Reference == reference {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b api.Explanation) int { return strings.Compare(a.Reference+" "+a.Name, b.Reference+" "+b.Name) })
	return list, nil
}

// is reports whether the layer is that with the chain id: containerd's metadata put a
// namespace and a number before it.
func (c *committed) is(chainID string) bool {
	return chainID != "" && (c.Labels[labelTarget] == chainID || c.Name == chainID || strings.HasSuffix(c.Name, "/"+chainID))
}

// committed returns the committed snapshots by their names.
func (s *Snapshotter) committed(ctx context.Context) (map[string]*committed, error) {
	all := map[string]*committed{}
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			all[info.Name] = &committed{Info: info, id: id}
			return err
		})
	})
	for _, c := range all {
		if p := all[c.Parent]; p != nil {
			p.parent = true
		}
	}
	return all, err
}

// explain is about the image whose uppermost layer is top.
func explain(all map[string]*committed, lazy map[string]Image, top *committed) api.Explanation {
	e := api.Explanation{Name: top.Name, State: unpacked}
	_, e.Why = decision(top.Labels)
	for c := top; c != nil; c = all[c.Parent] {
		what, why := decision(c.Labels)
		away := filesElsewhere(c.Labels)
		if away != "" {
			what, why = remote, errElsewhere(away).Error()
		}
		e.Layers = append(e.Layers, api.Layer{Snapshot: c.id, ChainID: c.Labels[labelTarget], Decision: what, Why: why, Labels: inputs(c.Labels)})
		if e.Reference == "" {
			e.Reference = referenceIn(c.Labels)
		}
		i, ok := lazy[c.id]
		switch {
		case ok && !e.Lazy:
			e.Lazy, e.Mountpoint, e.ID = true, i.Mountpoint, i.ID
			e.State, e.Why = i.state()
			if i.Reference != "" {
				e.Reference = i.Reference
			}
		case e.Lazy:
		case away != "":
			e.Why = why
		case what == remote:
			e.Why = "it has layers of data, but the one with the image's metadata is not here yet"
		}
	}
	return e
}

// state says what the image is doing, and why.
func (i Image) state() (what, why string) {
	switch {
	case i.Failure != "":
		return "failed", "when it was wanted last: " + i.Failure
	case i.Mounted:
		return "mounted", "erofsd has it mounted; what is read is fetched"
	}
	return "idle", "erofsd mounts it when a container wants it"
}
