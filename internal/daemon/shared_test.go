package daemon

import (
	"os"
	"path/filepath"
	"testing"
)

// Nothing is known of two images that share their blobs when both have been closed at the
// same time.
func TestSharedBlobsForgotten(t *testing.T) {
	d := startFake(t, false)
	one, _ := d.fixture(t, "zstd")
	two := one
	two.Bootstrap = longer(t, one.Bootstrap)
	images := []*image{d.acquired(t, one), d.acquired(t, two)}
	for _, img := range images {
		d.mu.Lock()
		delete(d.images, img.key) // closeIfIdle, and then closeImage
		d.mu.Unlock()
		d.t.remove(img)
	}
	for _, img := range images {
		for _, v := range img.devices {
			if err := d.drop(v); err != nil {
				t.Error(err)
			}
		}
		if err := img.boot.Close(); err != nil {
			t.Error(err)
		}
	}
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	if n := len(d.t.objects); n > 0 {
		t.Errorf("%d objects of closed images are known", n)
	}
}

// longer copies a bootstrap and adds a block: an image with the same blobs, and another
// digest.
func longer(t *testing.T, bootstrap string) string {
	t.Helper()
	p, err := os.ReadFile(bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "image.boot")
	if err := os.WriteFile(name, append(p, make([]byte, 4096)...), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
