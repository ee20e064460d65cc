package daemon

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/api"
)

func quiet() *log.Logger { return log.New(io.Discard, "", 0) }

// ociLayout makes an OCI layout directory of gzip layers.
func ociLayout(t testing.TB, layers ...string) string {
	t.Helper()
	dir := filepath.Join(newRoot(t), "layout")
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	put := func(mediaType string, p []byte) object {
		sum := sha256.Sum256(p)
		id := hex.EncodeToString(sum[:])
		if err := os.WriteFile(filepath.Join(blobs, id), p, 0o644); err != nil {
			t.Fatal(err)
		}
		return object{"mediaType": mediaType, "digest": "sha256:" + id, "size": len(p)}
	}
	encode := func(v any) []byte {
		p, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	var descs []object
	var diffs []string
	for _, l := range layers {
		p, err := os.ReadFile(l)
		if err != nil {
			t.Fatal(err)
		}
		descs = append(descs, put("application/vnd.oci.image.layer.v1.tar+gzip", p))
		diffs = append(diffs, fmt.Sprintf("sha256:%064d", len(diffs)))
	}
	config := put("application/vnd.oci.image.config.v1+json", encode(object{
		"architecture": runtime.GOARCH, "os": "linux", "rootfs": object{"type": "layers", "diff_ids": diffs},
	}))
	manifest := put("application/vnd.oci.image.manifest.v1+json", encode(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": descs,
	}))
	index := encode(object{"schemaVersion": 2, "manifests": []object{manifest}})
	for name, p := range map[string][]byte{"index.json": index, "oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)} {
		if err := os.WriteFile(filepath.Join(dir, name), p, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// always, as a number of times, lets a fault last until it is cleared.
const always = -1

// TestRegistryFaults: whatever the registry does while files are read, a reader gets
// the right bytes or EIO, and the right bytes once the registry is well again.
// Faults that end by themselves are not seen at all.
func TestRegistryFaults(t *testing.T) {
	dir, files := smallTree(t)
	// The file at the blob's beginning is first: the whole blob is as good as a part there, and
	// status has the error of the last fill.
	names := slices.Sorted(maps.Keys(files))
	for name, tc := range map[string]struct {
		action  backendtest.Action
		times   int // always: until cleared
		visible bool
	}{
		"401 once":            {backendtest.Status(http.StatusUnauthorized), 1, false},
		"500 twice":           {backendtest.Status(http.StatusInternalServerError), 2, false},
		"429":                 {backendtest.TooMany(1), 1, false},
		"reset":               {backendtest.Reset(1000), 1, false},
		"short":               {backendtest.Short(1000), 1, false},
		"wrong range once":    {backendtest.WrongRange("bytes 5-9/10"), 1, false},
		"whole blob for part": {backendtest.Whole, always, true},
		"gone":                {backendtest.Reset(0), always, true},
		"403":                 {backendtest.Status(http.StatusForbidden), always, true},
		"404":                 {backendtest.Status(http.StatusNotFound), always, true},
		"416":                 {backendtest.Status(http.StatusRequestedRangeNotSatisfiable), always, true},
		"wrong bytes":         {backendtest.WrongBytes, always, true},
		"wrong range":         {backendtest.WrongRange("bytes 5-9/10"), always, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t)
			d := startDaemon(t, daemonOptions{})
			m := d.mount(t, reg.push(t, dir, "team/app:1"))
			reg.Add(backendtest.BlobReads, tc.times, tc.action)
			failed := 0
			for _, f := range names {
				want := files[f]
				p, err := readAll(filepath.Join(m, f))
				switch {
				case isEIO(err):
					failed++
					if !bytes.HasPrefix(want, p) {
						t.Errorf("%s: wrong bytes before the error", f)
					}
				case err != nil:
					t.Error(err)
				case !bytes.Equal(p, want):
					t.Errorf("%s: wrong bytes", f)
				}
			}
			if (failed > 0) != tc.visible {
				t.Errorf("%d reads failed\n%s", failed, d.log)
			}
			if e := d.image(t, m).Blobs[0].LastError; tc.visible && e == "" {
				t.Error("status does not say why")
			}
			reg.Clear()
			for f, want := range files {
				// A backend that failed often is left alone for two seconds.
				await(t, f+" after the registry is well again", func() bool {
					p, err := readAll(filepath.Join(m, f))
					if err == nil && !bytes.Equal(p, want) {
						t.Errorf("%s: wrong bytes", f)
					}
					return err == nil
				})
			}
		})
	}
}

// TestMountFaults: a mount that cannot be has one clear error and leaves nothing,
// and another image is mounted after it.
func TestMountFaults(t *testing.T) {
	dir, _ := smallTree(t)
	reg := newRegistry(t)
	good := reg.push(t, dir, "team/app:1")
	d := startDaemon(t, daemonOptions{})
	for name, tc := range map[string]struct {
		reference, want string
		fault           backendtest.Action
	}{
		"no such tag":   {reg.host + "/team/app:none", "404", nil},
		"no such host":  {"127.0.0.1:1/team/app:1", "refused", nil},
		"not a name":    {"::", "reference", nil},
		"unauthorized":  {good.Reference, "401", backendtest.Status(http.StatusUnauthorized)},
		"forbidden":     {good.Reference, "403", backendtest.Status(http.StatusForbidden)},
		"wrong content": {good.Reference, "", backendtest.WrongBytes},
	} {
		t.Run(name, func(t *testing.T) {
			defer reg.Clear()
			if tc.fault != nil {
				reg.Add(backendtest.All, always, tc.fault)
			}
			_, err := d.Mount(t.Context(), api.MountRequest{Reference: tc.reference, PlainHTTP: true, Mountpoint: newMountpoint(t)})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q in it", err, tc.want)
			}
			t.Log(err)
		})
	}
	d.mount(t, good)
}
