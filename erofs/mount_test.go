package erofs_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/testenv"
)

// needMount skips t where images cannot be mounted from files.
func needMount(t *testing.T) {
	t.Helper()
	testenv.Root(t)
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(t.TempDir()))
}

// layOut writes the cache file of the fixture none, whose chunks are stored as
// they are, and returns the paths of bootstrap and cache file.
func layOut(t *testing.T) (boot, cache string) {
	t.Helper()
	image := readFixture(t, "none")
	m := open(t, image)
	d := m.Devices()[0]
	blob, err := os.Open(filepath.Join(testenv.Fixtures(t), "none", "blobs", d.Tag))
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	dir := t.TempDir()
	boot, cache = filepath.Join(dir, "boot"), filepath.Join(dir, "cache")
	f, err := os.Create(cache)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Truncate(int64(d.Blocks)*4096), os.WriteFile(boot, image, 0o600)); err != nil {
		t.Fatal(err)
	}
	for c, err := range m.Chunks() {
		if err != nil || c.Compressed || c.CLen != c.Len {
			t.Fatalf("chunk %+v: %v", c, err)
		}
		p := make([]byte, c.Len)
		if _, err := blob.ReadAt(p, c.COff); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(p, c.Off); err != nil {
			t.Fatal(err)
		}
	}
	return boot, cache
}

func unmount(t *testing.T, target string) {
	t.Helper()
	if err := erofs.Unmount(target, false); err != nil {
		t.Errorf("%v", err)
	}
}

func TestMount(t *testing.T) {
	needMount(t)
	boot, cache := layOut(t)
	want := testenv.LoadTree(t, "tree.jsonl")
	bootFile, err := os.Open(boot)
	if err != nil {
		t.Fatal(err)
	}
	defer bootFile.Close()
	cacheFile, err := os.Open(cache)
	if err != nil {
		t.Fatal(err)
	}
	defer cacheFile.Close()
	target := t.TempDir()
	dir, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	fd := func(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]erofs.MountOptions{
		"paths":       {Source: boot, Devices: []string{cache}, Target: target},
		"link":        {Source: boot, Devices: []string{cache}, Target: link},
		"descriptors": {Source: fd(bootFile), Devices: []string{fd(cacheFile)}, TargetFD: int(dir.Fd())},
	} {
		t.Run(name, func(t *testing.T) {
			if err := erofs.Mount(o); err != nil {
				t.Fatal(err)
			}
			defer unmount(t, target)
			got, err := testenv.ScanTree(target, true)
			if err != nil {
				t.Fatal(err)
			}
			want.Compare(t, got, false)
		})
	}
}

func TestMountFlags(t *testing.T) {
	needMount(t)
	boot, cache := layOut(t)
	for _, strict := range []bool{false, true} {
		target := t.TempDir()
		o := erofs.MountOptions{Source: boot, Devices: []string{cache}, Target: target, NoSuid: strict, NoDev: strict}
		if err := erofs.Mount(o); err != nil {
			t.Fatal(err)
		}
		var st syscall.Statfs_t
		err := syscall.Statfs(target, &st)
		unmount(t, target)
		if err != nil {
			t.Fatal(err)
		}
		const flags = syscall.MS_RDONLY | syscall.MS_NOSUID | syscall.MS_NODEV
		want := int64(syscall.MS_RDONLY)
		if strict {
			want = flags
		}
		if st.Flags&flags != want {
			t.Errorf("strict %v: flags 0x%x, want 0x%x", strict, st.Flags&flags, want)
		}
	}
}

func TestMountErrors(t *testing.T) {
	needMount(t)
	boot, cache := layOut(t)
	target := t.TempDir()
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
		o          erofs.MountOptions
	}{
		{"no devices file", "no such file", erofs.MountOptions{Source: boot, Devices: []string{cache + "x"}, Target: target}},
		{"too many devices", "read the image: invalid argument (the kernel's log says why)", erofs.MountOptions{Source: boot, Devices: []string{cache, cache}, Target: target}},
		{"no image", "read the image", erofs.MountOptions{Source: garbage, Target: target}},
		{"missing image", "no such file", erofs.MountOptions{Source: boot + "x", Target: target}},
		{"long device", "255", erofs.MountOptions{Source: boot, Devices: []string{"/" + strings.Repeat("x", 255)}, Target: target}},
		{"empty device", "1 to 255", erofs.MountOptions{Source: boot, Devices: []string{""}, Target: target}},
		{"no target", "attach to", erofs.MountOptions{Source: boot, Devices: []string{cache}, Target: target + "/no"}},
		{"file as target", "attach to", erofs.MountOptions{Source: boot, Devices: []string{cache}, Target: garbage}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := erofs.Mount(c.o)
			if err == nil {
				unmount(t, target)
				t.Fatal("mounted")
			}
			t.Log(err)
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q is not in the error", c.want)
			}
			if list, err := os.ReadDir(target); err != nil || len(list) > 0 {
				t.Errorf("the target has %d entries, %v", len(list), err)
			}
		})
	}
}

func TestUnmountBusy(t *testing.T) {
	needMount(t)
	boot, cache := layOut(t)
	target := t.TempDir()
	if err := erofs.Mount(erofs.MountOptions{Source: boot, Devices: []string{cache}, Target: target}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := erofs.Unmount(target, false); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("unmount in use: %v, want EBUSY", err)
	}
	if err := erofs.Unmount(target, true); err != nil {
		t.Error(err)
	}
	if err := erofs.Unmount(target, true); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("unmount of no mount: %v, want EINVAL", err)
	}
}

func TestSupportedElsewhere(t *testing.T) {
	needMount(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unmount(t, dir)
	err := erofs.Supported(dir)
	t.Log(err)
	if err != nil && !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("on tmpfs: %v, want success or not supported", err)
	}
	if err := erofs.Supported(filepath.Join(dir, "no")); err == nil || errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("in a missing directory: %v", err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Errorf("%d files left, %v", len(list), err)
	}
}
