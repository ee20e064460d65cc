package daemon

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// bindRequest names a fixture's image.
func bindRequest(t testing.TB) (api.BindRequest, imageKey) {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "zstd")
	k := imageKey{"team", "name"}
	return api.BindRequest{
		ID: k.id, DomainID: k.domain, Bootstrap: filepath.Join(dir, "image.boot"), Config: localConfig(t, "x", filepath.Join(dir, "blobs"), ""),
	}, k
}

// The bootstrap and the record of a bound image stay, whatever is removed at the same time
// because an earlier image had its name.
func TestBindWhileCulled(t *testing.T) {
	d := startFake(t, false)
	r, k := bindRequest(t)
	ctx, cancel := context.WithCancel(t.Context())
	var culls sync.WaitGroup
	defer culls.Wait()
	defer cancel()
	culls.Go(func() {
		for ctx.Err() == nil {
			if err := d.cull(ctx, k.id); err != nil && !errors.Is(err, errStillOpen) && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for range 200 {
		if err := d.BindImage(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		for _, suffix := range []string{bootSuffix, recordSuffix} {
			if !exists(d.file(k, suffix)) {
				t.Fatalf("%s is missing of an image that is bound", suffix)
			}
		}
		if err := d.Unbind(k); err != nil {
			t.Fatal(err)
		}
	}
}

// A binding that has ended cannot be revived: the image is bound anew.
func TestRebindEnded(t *testing.T) {
	d := startFake(t, false)
	r, k := bindRequest(t)
	if err := d.BindImage(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	old := d.bound(k)
	if err := d.Unbind(k); err != nil {
		t.Fatal(err)
	}
	if err := d.rebind(t.Context(), old, old); !errors.Is(err, errEnded) {
		t.Errorf("got %v", err)
	}
}
