package torture

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// TestBoundSurvives: an image that is bound in no domain, and pinned, is that after the
// death of the worker, too.
func TestBoundSurvives(t *testing.T) {
	way := transport(t)
	i := newImage(t, newSeed(t), 5, "zstd")
	m := start(t, daemon.Options{Transport: way, FillTimeout: patience})
	type object = map[string]any
	config, err := json.Marshal(object{"device": object{
		"backend": object{"type": "localfs", "config": object{"dir": i.blobs}}, "cache": object{"type": "fscache"},
	}, "mode": "direct"})
	if err != nil {
		t.Fatal(err)
	}
	r := api.BindRequest{ID: "image", Bootstrap: i.boot, Pinned: true, Config: config}
	if err := m.BindImage(context.Background(), r); err != nil {
		t.Fatal(err)
	}
	m.kill(syscall.SIGKILL)
	m.await("a successor", func() bool { return m.deaths() == 1 && m.Health(context.Background()) == nil })
	point := filepath.Join(m.dir, "bound")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Mount(context.Background(), api.MountRequest{Mountpoint: point, Image: "image"}); err != nil {
		t.Fatal(err)
	}
	(&score{}).readers(i, point, 2, 1)(t, m)
	status, err := m.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(status.Kept) != 1 || !status.Kept[0].Pinned {
		t.Errorf("%+v", status.Kept)
	}
	m.unmount(point)
	if err := m.UnbindImage(context.Background(), api.ImageRequest{Image: "image"}); err != nil {
		t.Error(err)
	}
	m.stop()
}
