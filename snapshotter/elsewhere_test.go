package snapshotter

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
)

// TestFilesElsewhere adopts images that nydus-snapshotter has pulled in ways that are not done
// here: containers, views and layers over them are refused, and see no empty directory;
// everything else goes on, and pulled again the images are unpacked.
func TestFilesElsewhere(t *testing.T) {
	root := t.TempDir()
	store, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	err = store.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		for i, e := range elsewheres() {
			chain := "sha256:" + strconv.Itoa(i)
			sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "extract "+chain, "")
			if err == nil {
				_, err = storage.CommitActive(ctx, "extract "+chain, chain, snapshots.Usage{}, with(chain, e.label, "true"))
			}
			if err = errors.Join(err, os.MkdirAll(filepath.Join(root, snapshotsDir, sn.ID, "fs"), 0o755)); err != nil {
				return err
			}
		}
		return nil
	})
	if err := errors.Join(err, store.Close()); err != nil {
		t.Fatal(err)
	}
	s := open(t, root)
	layer(t, s, "plain", "")
	prepare(t, s, "beside", "plain")
	for i, e := range elsewheres() {
		chain := "sha256:" + strconv.Itoa(i)
		_, perr := s.Prepare(t.Context(), "c", chain)
		_, verr := s.View(t.Context(), "v", chain)
		_, lerr := s.Prepare(t.Context(), "l", chain, with("sha256:next"))
		for what, err := range map[string]error{"container": perr, "view": verr, "layer": lerr} {
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), e.what) || !strings.Contains(err.Error(), "pull it again") {
				t.Errorf("%s: a %s over it: %v", e.label, what, err)
			}
		}
		if list, err := s.Explain(t.Context(), "", []string{chain}); err != nil || len(list) == 0 || !strings.Contains(explained(list, chain), e.what) {
			t.Errorf("%s: explained as %+v, %v", e.label, list, err)
		}
		if _, err := s.Update(t.Context(), snapshots.Info{Name: chain}); err != nil {
			t.Error(err)
		}
		if _, err := s.Prepare(t.Context(), "c", chain); err == nil {
			t.Errorf("%s: an update has made files of it", e.label)
		}
		if err := s.Remove(t.Context(), chain); err != nil {
			t.Fatal(err)
		}
		annotated := map[string]string{labelTarget: chain, e.label: "true", labelTOC: "sha256:toc"} // by anybody
		layer(t, s, chain, "", snapshots.WithLabels(maps.Clone(annotated)))
		prepare(t, s, "c"+chain, chain)
	}
	list, err := s.Explain(t.Context(), "", []string{"sha256:0"})
	if err != nil || !strings.Contains(explained(list, "sha256:0"), "eStargz") {
		t.Errorf("an eStargz image is explained as %+v, %v", list, err)
	}
}

// explained is why the image whose uppermost layer is called name is served as it is.
func explained(list []api.Explanation, name string) string {
	for _, e := range list {
		if e.Name == name {
			return e.Why
		}
	}
	return ""
}
