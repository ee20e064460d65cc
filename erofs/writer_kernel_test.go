package erofs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/erofsd/erofsd/internal/testenv"
)

// mountImage mounts img file-backed with its devices as plain files.
func (m *model) mountImage(t *testing.T, img []byte) string {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	t.Chdir(dir) // short names: mount(2) takes one page of options
	var options []string
	for k, d := range m.used(t, img) {
		name := strconv.Itoa(k)
		if err := os.WriteFile(name, d, 0o600); err != nil {
			t.Fatal(err)
		}
		options = append(options, "device="+name)
	}
	if err := os.WriteFile("boot", img, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("mnt", 0o755); err != nil {
		t.Fatal(err)
	}
	err := syscall.Mount("boot", "mnt", "erofs", syscall.MS_RDONLY, strings.Join(options, ","))
	if errors.Is(err, syscall.ENOTBLK) || errors.Is(err, syscall.ENODEV) {
		testenv.Kernel(t, "file-backed erofs", err)
	}
	if err != nil {
		t.Fatalf("mount: %v", err)
	}
	mnt := filepath.Join(dir, "mnt")
	t.Cleanup(func() {
		if err := syscall.Unmount(mnt, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return mnt
}

// checkKernel mounts the image and compares all that the kernel shows of it.
func (m *model) checkKernel(t *testing.T, img []byte) {
	t.Helper()
	mnt := m.mountImage(t, img)
	got := map[string]record{}
	err := filepath.WalkDir(mnt, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(mnt, p)
		if err != nil {
			return err
		}
		got[rel], err = observe(p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	compare(t, "kernel", got, m.records())
}

func observe(p string) (record, error) {
	var s syscall.Stat_t
	if err := syscall.Lstat(p, &s); err != nil {
		return record{}, fmt.Errorf("lstat %s: %w", p, err)
	}
	r := record{mode: s.Mode, uid: s.Uid, gid: s.Gid, nlink: uint32(s.Nlink), sec: s.Mtim.Sec, nsec: uint32(s.Mtim.Nsec)}
	switch s.Mode & typeMask {
	case typeReg:
		data, err := os.ReadFile(p)
		if err != nil {
			return r, err
		}
		r.size, r.sum = s.Size, sha256.Sum256(data)
	case typeLnk:
		target, err := os.Readlink(p)
		if err != nil {
			return r, err
		}
		r.size, r.target = s.Size, target
	case typeChr, typeBlk:
		r.major, r.minor = uint32(s.Rdev>>8&0xfff), uint32(s.Rdev&0xff|s.Rdev>>12&0xfff00)
	}
	x, err := lxattrs(p)
	r.xattrs = xattrString(x)
	return r, err
}

// lxattrs reads attributes without following symlinks, which package syscall
// cannot.
func lxattrs(p string) (map[string]string, error) {
	call := func(nr uintptr, name string) ([]byte, error) {
		path, _ := syscall.BytePtrFromString(p)
		buf := make([]byte, 1<<17)
		var n uintptr
		var errno syscall.Errno
		if nr == syscall.SYS_LLISTXATTR {
			n, _, errno = syscall.Syscall(nr, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		} else {
			key, _ := syscall.BytePtrFromString(name)
			n, _, errno = syscall.Syscall6(nr, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(key)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
		}
		if errno != 0 {
			return nil, fmt.Errorf("xattr %s of %s: %w", name, p, errno)
		}
		return buf[:n], nil
	}
	list, err := call(syscall.SYS_LLISTXATTR, "")
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for name := range bytes.SplitSeq(list, []byte{0}) {
		if len(name) == 0 {
			continue
		}
		value, err := call(syscall.SYS_LGETXATTR, string(name))
		if err != nil {
			return nil, err
		}
		out[string(name)] = string(value)
	}
	return out, nil
}

func TestWriteKernelEverything(t *testing.T) {
	for _, shared := range []bool{false, true} {
		for _, size := range []uint32{4096, 64 << 10, 1 << 20} {
			t.Run(fmt.Sprintf("shared=%v/%d", shared, size), func(t *testing.T) {
				m := everything(size)
				m.o.SharedXattrs = shared
				m.checkKernel(t, m.write(t))
			})
		}
	}
}

func TestWriteKernelNoBlobs(t *testing.T) {
	m := newModel(1 << 20)
	m.put("a/b", &Node{Mode: typeReg | 0o644})
	m.put("a/l", &Node{Mode: typeLnk | 0o777, Target: "b"})
	m.checkKernel(t, m.write(t))
	m = newModel(4096)
	img := m.write(t)
	m.checkKernel(t, img)
	m.checkGoErofs(t, img)
}

// TestWriteKernelMaxBlobs reads from as many devices as RAFS can name.
func TestWriteKernelMaxBlobs(t *testing.T) {
	m := newModel(4096)
	for i := range maxBlobs {
		m.put(fmt.Sprintf("f%03d", i), m.file(m.blob(), bytes.Repeat([]byte{byte(i)}, 5000)))
	}
	img := m.write(t)
	m.checkGoErofs(t, img)
	m.checkKernel(t, img)
}

// TestWriteKernelFlat joins bootstrap and blobs at their mapped addresses: the
// kernel then needs no device option.
func TestWriteKernelFlat(t *testing.T) {
	m := everything(64 << 10)
	img := m.write(t)
	flat := bytes.Clone(img)
	for k, d := range m.used(t, img) {
		at := int64(le32(img[deviceTable+k*deviceSize+68:])) * blockSize
		if at%deviceGap != 0 || at < int64(len(flat)) {
			t.Fatalf("device %d at %#x, which is not a multiple of 512 KiB behind %#x", k, at, len(flat))
		}
		flat = append(flat, make([]byte, at-int64(len(flat)))...)
		flat = append(flat, d...)
	}
	want := m.records()
	testenv.Root(t)
	t.Chdir(t.TempDir())
	if err := errors.Join(os.WriteFile("flat", flat, 0o600), os.Mkdir("mnt", 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("flat", "mnt", "erofs", syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Unmount("mnt", 0); err != nil {
			t.Error(err)
		}
	}()
	for _, p := range []string{"mixed", "repeat", "x/huge", "sizes/4097"} {
		got, err := observe("mnt/" + p)
		if err != nil {
			t.Fatal(err)
		}
		compare(t, "flat", map[string]record{p: got}, map[string]record{p: want[p]})
	}
}

func TestWriteKernelBigDirectory(t *testing.T) {
	m := newModel(1 << 20)
	big := m.put("big", dir(0o755))
	for i := range 100_000 {
		big.Children[fmt.Sprintf("entry-%d", i*7919)] = &Node{Mode: typeFifo | 0o600, Sec: int64(i)}
	}
	img := m.write(t)
	mnt := m.mountImage(t, img)
	names, err := os.ReadDir(filepath.Join(mnt, "big"))
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != len(big.Children) {
		t.Fatalf("%d entries, want %d", len(names), len(big.Children))
	}
	left := maps.Clone(big.Children)
	for _, e := range names {
		if left[e.Name()] == nil {
			t.Fatalf("unexpected or repeated entry %q", e.Name())
		}
		delete(left, e.Name())
	}
	for _, i := range []int{0, 1, 99_999, 50_000, 31_415} {
		var s syscall.Stat_t
		if err := syscall.Lstat(filepath.Join(mnt, fmt.Sprintf("big/entry-%d", i*7919)), &s); err != nil || s.Mtim.Sec != int64(i) {
			t.Errorf("entry %d: mtime %d, %v", i, s.Mtim.Sec, err)
		}
	}
}
