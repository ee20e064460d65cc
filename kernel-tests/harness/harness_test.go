package harness

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) {
	Init()
	testenv.Main(m)
}

// native mounts a native image of a small tree that holds what the test needs.
func native(t *testing.T) (dir, image string) {
	t.Helper()
	testenv.Root(t)
	testenv.Tool(t, "mkfs.erofs")
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(t.TempDir()))
	tree := t.TempDir()
	for _, d := range []string{"proc", "bin"} {
		if err := os.Mkdir(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "data"), bytes.Repeat([]byte("x"), 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", filepath.Join(tree, "bin", "show"), "./testdata/show")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	image, dir = filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := Native(t.Context(), tree, image); err != nil {
		t.Fatal(err)
	}
	unmount, err := MountNative(dir, image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	})
	return dir, image
}

func TestContainer(t *testing.T) {
	dir, _ := native(t)
	out, err := Command(t.Context(), dir, t.TempDir(), "/bin/show").CombinedOutput()
	if err != nil {
		t.Fatalf("container: %v\n%s", err, out)
	}
	if want := "pid 1\nroot bin data proc\nwritable true\n"; string(out) != want {
		t.Errorf("the program sees\n%swant\n%s", out, want)
	}
	if _, err := os.Stat(filepath.Join(dir, "written")); err == nil {
		t.Error("what the container wrote is in the image")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(mounts), dir) != 1 {
		t.Errorf("the container left mounts behind:\n%s", mounts)
	}
}

func TestDropTree(t *testing.T) {
	dir, image := native(t)
	if n, err := ReadAll(t.Context(), dir); err != nil || n < 1<<20 {
		t.Fatalf("tar read %d bytes, error %v", n, err)
	}
	cached, err := ResidentBytes(dir)
	if err != nil || cached < 1<<20 {
		t.Fatalf("%d bytes are cached after all were read, error %v", cached, err)
	}
	if err := DropTree(dir); err != nil {
		t.Fatal(err)
	}
	if err := DropFile(image); err != nil {
		t.Fatal(err)
	}
	if cached, err = ResidentBytes(dir); err != nil || cached > 64<<10 {
		t.Errorf("%d bytes are cached after all were dropped, error %v", cached, err)
	}
}

// TestReadahead checks that the floor of the measurements is one: without
// readahead only what a program touches becomes resident.
func TestReadahead(t *testing.T) {
	_, image := native(t)
	testenv.Tool(t, "losetup")
	dir := t.TempDir()
	unmount, err := MountWithoutReadahead(t.Context(), dir, image)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	}()
	f, err := os.Open(filepath.Join(dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.ReadAt(make([]byte, 1), 512<<10)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	if cached, err := ResidentBytes(dir); err != nil || cached == 0 || cached > 64<<10 {
		t.Errorf("%d bytes are cached after one byte was read, error %v", cached, err)
	}
}
