package erofs_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	goerofs "github.com/erofs/go-erofs"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

// sourceTree makes a directory with one of everything.
func sourceTree(t *testing.T) (string, testenv.Tree) {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"many", "d/sub"} {
		do(os.MkdirAll(path(name), 0o755))
	}
	for i := range 700 {
		do(os.WriteFile(path(fmt.Sprintf("many/a rather long name so that there are several blocks %d", i)), []byte{byte(i)}, 0o644))
	}
	noise := make([]byte, 200_000)
	for i := range noise {
		noise[i] = byte(i*i>>7 ^ i*7)
	}
	for _, n := range []int{0, 1, 511, 512, 513, 4000, 4095, 4096, 4097, 65536, 65537, 200_000} {
		name := path(fmt.Sprintf("size-%d", n))
		do(os.WriteFile(name, noise[:n], 0o640))
		do(os.Chown(name, 1000+n, 70_000))
	}
	do(os.WriteFile(path("d/hole"), nil, 0o600))
	do(os.Truncate(path("d/hole"), 1<<20))
	do(os.Link(path("size-4097"), path("d/link")))
	do(os.Symlink("../size-1", path("d/symlink")))
	do(os.Symlink(strings.Repeat("y", 3000), path("long-target")))
	do(syscall.Mknod(path("d/device"), syscall.S_IFBLK|0o600, 259<<8|0x11))
	do(syscall.Mknod(path("d/fifo"), syscall.S_IFIFO|0o600, 0))
	for _, name := range []string{"size-1", "size-512", "size-65537", "d/sub", "d/link"} {
		do(syscall.Setxattr(path(name), "user.shared", []byte("the same for all of them"), 0))
	}
	do(syscall.Setxattr(path("size-1"), "user.own", bytes.Repeat([]byte{0, 1}, 300), 0))
	do(syscall.Setxattr(path("size-1"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	do(os.Chmod(path("size-1"), 0o755|os.ModeSetuid))
	tree, err := testenv.ScanTree(dir, true)
	do(err)
	return dir, tree
}

// comparePlain reads and checks the image in file, and mounts it.
func comparePlain(t *testing.T, want testenv.Tree, file string, devices ...string) {
	t.Helper()
	var data [][]byte
	for _, name := range append([]string{file}, devices...) {
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, p)
	}
	m := open(t, data[0])
	got, err := imageTree(m, data...)
	if err != nil {
		t.Fatal(err)
	}
	want.Compare(t, got, false)
	sum, err := check(data[0], erofs.Limits{})
	if len(m.Devices()) > 0 && err != nil && strings.Contains(err.Error(), "size is not given") {
		return // mkfs.erofs 1.5
	}
	if err != nil {
		t.Fatal(err)
	}
	if sum.Entries != int64(len(want)-1) || sum.RAFS {
		t.Errorf("%+v for %d names", sum, len(want)-1)
	}
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(t.TempDir()))
	target := t.TempDir()
	if err := erofs.Mount(erofs.MountOptions{Source: file, Devices: devices, Target: target}); err != nil {
		t.Fatal(err)
	}
	defer unmount(t, target)
	if got, err = testenv.ScanTree(target, true); err != nil {
		t.Fatal(err)
	}
	want.Compare(t, got, false)
}

func TestMkfs(t *testing.T) {
	mkfs := testenv.Tool(t, "mkfs.erofs")
	src, tree := sourceTree(t)
	const fixed = 1_600_000_000
	for name, args := range map[string][]string{
		"default":        nil,
		"shared xattrs":  {"-x1"},
		"extended":       {"-Eforce-inode-extended"},
		"compact":        {"-Eforce-inode-compact", "--all-root"},
		"no inline data": {"-Enoinline_data"},
		"no checksum":    {"-Enosbcrc"},
		"chunks 4k":      {"--chunksize=4096"},
		"chunks 64k":     {"--chunksize=65536"},
		"blob device":    {"--chunksize=16384", "--blobdev=DEVICE"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			image, devices := filepath.Join(dir, "image"), []string(nil)
			args = append([]string{"--quiet", fmt.Sprintf("-T%d", fixed)}, args...)
			for i, a := range args {
				if rest, ok := strings.CutSuffix(a, "DEVICE"); ok {
					devices = []string{filepath.Join(dir, "device")}
					args[i] = rest + devices[0]
				}
			}
			want := testenv.Tree{}
			for path, e := range tree {
				e.Mtime = fixed * 1e9
				if name == "compact" {
					e.UID, e.GID = 0, 0
				}
				want[path] = e
			}
			if out, err := exec.Command(mkfs, append(args, image, src)...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			comparePlain(t, want, image, devices...)
		})
	}
}

func TestGoErofs(t *testing.T) {
	src, want := sourceTree(t)
	for _, size := range []int{512, 4096} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "image")
			f, err := os.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for path, e := range want { // os.DirFS shows no attributes and no hard links
				e.Xattrs, e.Nlink, e.Inode = nil, 0, ""
				want[path] = e
			}
			w := goerofs.Create(f, goerofs.WithBlockSize(size))
			if err := w.CopyFrom(os.DirFS(src)); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			comparePlain(t, want, name)
		})
	}
}
