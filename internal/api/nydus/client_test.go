package nydus_test

import (
	"encoding/json"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/api/nydus/nydustest"
)

// client returns a client of a model.
func client(t *testing.T, s nydustest.Setup) (*nydus.Client, map[string]string) {
	t.Helper()
	m := newModel(s)
	vars, err := m.writeImages(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	socket, _, _ := serve(t, nydus.Handler(m))
	c := nydus.NewClient(socket)
	t.Cleanup(c.Close)
	return c, vars
}

// TestClient makes an image known and has it forgotten.
func TestClient(t *testing.T) {
	c, vars := client(t, nydustest.Setup{State: "RUNNING"})
	info, err := c.Info(t.Context())
	if err != nil || info.State != nydus.Running || info.Backends != nil || info.Version.Package != "0" {
		t.Errorf("it is %+v, %v", info, err)
	}
	put := func(boot string) error {
		return c.PutBlob(t.Context(), map[string]any{"type": "bootstrap", "id": "a", "domain_id": "d", "config": map[string]any{
			"id": "a", "backend_type": "localfs", "cache_type": "fscache", "metadata_path": boot, "cache_config": map[string]any{"work_dir": filepath.Dir(boot)},
		}})
	}
	if _, err := c.CacheMetrics(t.Context(), "a"); !nydus.IsNotFound(err) {
		t.Errorf("counted of nothing: %v", err)
	}
	if err := put(vars["BOOT1"]); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CacheMetrics(t.Context(), "a"); err != nil {
		t.Errorf("counted of an image: %v", err)
	}
	if err := put(vars["BOOT2"]); !nydus.IsExists(err) || !nydus.IsRefused(err) || nydus.IsNoEntry(err) {
		t.Errorf("another one by the same name: %v", err)
	}
	if err := c.SetConfig(t.Context(), "a", map[string]string{"registry_auth": "YTpi"}); err != nil {
		t.Errorf("another login: %v", err)
	}
	for range 2 {
		if err := c.DeleteBlobs(t.Context(), "d"); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if err := c.CullBlob(t.Context(), "a"); err != nil {
		t.Errorf("cull: %v", err)
	}
}

// TestClientMounts mounts where nydusd does that itself.
func TestClientMounts(t *testing.T) {
	c, _ := client(t, nydustest.Setup{State: "RUNNING", Mounts: true})
	if info, err := c.Info(t.Context()); err != nil || info.Backends == nil {
		t.Errorf("without mounts it is %+v, %v", info, err)
	}
	m := nydus.MountCommand{Source: "/boot", Type: nydus.Rafs, Config: "{}", PrefetchFiles: []string{"/a"}}
	if err := c.Mount(t.Context(), "/x y", m); err != nil {
		t.Fatal(err)
	}
	if info, err := c.Info(t.Context()); err != nil || len(info.Backends) != 1 || info.Backends["/x y"].Mountpoint != "/x y" {
		t.Errorf("with a mount it is %+v, %v", info, err)
	}
	if err := c.Mount(t.Context(), "/x y", m); !nydus.IsExists(err) {
		t.Errorf("the same again: %v", err)
	}
	if err := c.Unmount(t.Context(), "/x y"); err != nil {
		t.Error(err)
	}
	if err := c.Unmount(t.Context(), "/x y"); !nydus.IsNoEntry(err) {
		t.Errorf("the same again: %v", err)
	}
}

// TestClientElsewhere asks what is no nydusd, and nobody.
func TestClientElsewhere(t *testing.T) {
	socket, _, _ := serve(t, http.NotFoundHandler())
	c := nydus.NewClient(socket)
	defer c.Close()
	if _, err := c.Info(t.Context()); !nydus.IsNotFound(err) || !strings.Contains(err.Error(), "page not found") {
		t.Errorf("another server: %v", err)
	}
	nobody := nydus.NewClient(filepath.Join(t.TempDir(), "api.sock"))
	if _, err := nobody.Info(t.Context()); err == nil || nydus.IsRefused(err) {
		t.Errorf("nobody: %v", err)
	}
}

// TestMountTime reads what it writes, and takes what it does not know for no time.
func TestMountTime(t *testing.T) {
	at := time.Date(2026, time.November, 22, 1, 2, 3, 4, time.UTC)
	p, err := json.Marshal(nydus.MountTime(at))
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]time.Time{string(p): at, `"2026-11-22"`: {}, `null`: {}} {
		var got nydus.MountTime
		if err := json.Unmarshal([]byte(text), &got); err != nil || !time.Time(got).Equal(want) {
			t.Errorf("%s is %v, %v; want %v", text, time.Time(got), err, want)
		}
	}
}
