package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// servedFixtures are the images of nydus's own tools that this transport
// serves.
var servedFixtures = []string{"zstd", "lz4", "none", "sha256-64k", "batch", "layered"}

// copyBlobs copies a fixture's blobs, so that a test may change them.
func copyBlobs(t testing.TB, fixture string) (dir string) {
	t.Helper()
	dir = filepath.Join(newRoot(t), "blobs")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(fixture, "blobs"))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestFixtures mounts every image through the running kernel and compares every
// path: with nothing cached, page-cold, and from a complete cache whose blobs
// are gone, by a new daemon.
func TestFixtures(t *testing.T) {
	fixtures := testenv.Fixtures(t)
	for _, name := range servedFixtures {
		t.Run(name, func(t *testing.T) {
			tree := fixtureList(t)
			if name == "layered" {
				tree = testenv.LoadTree(t, "layered.jsonl")
			}
			blobs := copyBlobs(t, filepath.Join(fixtures, name))
			req := api.MountRequest{Bootstrap: filepath.Join(fixtures, name, "image.boot"), BlobDir: blobs}

			d := startDaemon(t, daemonOptions{completion: true})
			m := d.mount(t, req)
			compareTree(t, tree, m)
			events := d.image(t, m).KernelEvents
			if events == 0 {
				t.Fatal("the kernel asked for nothing: the files were not marked when they were mounted")
			}
			d.umount(t, m)

			m = d.mount(t, req) // page-cold: the pages went with the mount
			compareTree(t, tree, m)
			await(t, "completion", func() bool { return d.image(t, m).Complete })
			d.umount(t, m)
			root := d.root
			d.stop(t)

			if err := os.RemoveAll(blobs); err != nil {
				t.Fatal(err)
			}
			d = startDaemon(t, daemonOptions{root: root})
			m = d.mount(t, req)
			compareTree(t, tree, m)
			if s := d.image(t, m); s.BackendRequests != 0 || !s.Complete {
				t.Errorf("a complete cache still asked: %+v", s)
			}
		})
	}
}
