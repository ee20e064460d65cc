package power

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// A disk has an ext4, and behind it, at labelPlace, room for labels.
const (
	diskSize   = 128 << 20
	labelPlace = diskSize - 1<<20
)

// patience is how long anything may take that has no limit of its own. A guest's
// processors are emulated.
const patience = 2 * time.Minute

// makeDisk makes a sparse file with an empty file system.
func makeDisk(t *testing.T, name string) {
	t.Helper()
	mkfs := testenv.Tool(t, "mkfs.ext4")
	if err := errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, diskSize)); err != nil {
		t.Fatal(err)
	}
	const options = "nodiscard,lazy_itable_init=1,lazy_journal_init=1"
	cmd := exec.CommandContext(t.Context(), mkfs, "-q", "-F", "-b", "4096", "-m", "0", "-E", options, name, fmt.Sprint(labelPlace/4096))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
}

// A mounted is a file system that a test has mounted.
type mounted struct {
	dir    string
	device string // below it
}

// Mount options. All have the journal committed every second: more moments at which what
// was written before becomes durable, and part of what comes then does not.
const (
	asUsual = "commit=1,noinit_itable"
	// weak has files say that data are there before they are: nothing orders them and
	// the journal, and blocks count as written as soon as a file has them.
	weak = asUsual + ",data=writeback,dioread_lock"
)

// mountDevice mounts a device; the test's cleanup unmounts it unless it is done already.
func mountDevice(t *testing.T, device, options string) *mounted {
	t.Helper()
	m := &mounted{dir: t.TempDir(), device: device}
	if err := unix.Mount(device, m.dir, "ext4", 0, options); err != nil {
		t.Fatalf("mount %s: %v", device, err)
	}
	t.Cleanup(func() { m.unmount(t) })
	return m
}

// mountFile mounts the file system in a file, by a loop device that ends with the mount.
func mountFile(t *testing.T, name, options string) *mounted {
	t.Helper()
	device, loop, err := attach(name)
	if err != nil {
		t.Fatalf("attach %s to a loop device: %v", name, err)
	}
	defer loop.Close()
	return mountDevice(t, device, options)
}

// attach returns a loop device for a file, open: it ends with its last user.
func attach(name string) (string, *os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	defer control.Close()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", nil, fmt.Errorf("find a free loop device: %w", err)
		}
		device := fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			return "", nil, err
		}
		config := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &config); err == nil {
			return device, loop, nil
		}
		loop.Close()
		if err != unix.EBUSY { // another process was faster
			return "", nil, err
		}
	}
}

// unmount unmounts it as soon as nobody uses it any more, or at last though somebody does.
// Twice is once.
func (m *mounted) unmount(t *testing.T) {
	t.Helper()
	if m.device == "" {
		return
	}
	err := unix.Unmount(m.dir, 0)
	for start := time.Now(); err == unix.EBUSY && time.Since(start) < patience; time.Sleep(5 * time.Millisecond) {
		err = unix.Unmount(m.dir, 0)
	}
	if err != nil {
		t.Errorf("unmount %s: %v, %v when detached", m.dir, err, unix.Unmount(m.dir, unix.MNT_DETACH))
	}
	m.device = ""
}

// label names what is written from now on. It is no flush.
func (m *mounted) label(t *testing.T, text string) {
	t.Helper()
	f, err := os.OpenFile(m.device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(aligned(Label(text)), labelPlace); err != nil {
		t.Fatal(err)
	}
}

// aligned is p where O_DIRECT takes it from.
func aligned(p []byte) []byte {
	room := make([]byte, len(p)+labelSize)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(room))) % labelSize
	return append(room[skip:skip], p...)
}

// syncOften makes everything durable now and then until ctx ends, as others on a machine do.
func (m *mounted) syncOften(ctx context.Context, pause func() time.Duration) error {
	dir, err := os.Open(m.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	for ctx.Err() == nil {
		if err := unix.Syncfs(int(dir.Fd())); err != nil {
			return fmt.Errorf("sync %s: %w", m.dir, err)
		}
		time.Sleep(pause())
	}
	return nil
}

// copySparse copies a file, and leaves holes where nothing but zeroes is.
func copySparse(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	size, err := in.Seek(0, io.SeekEnd) // also of a block device
	if err != nil {
		return err
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	return copyData(out, in, size)
}

// copyData copies what is not zero, and of a file not what is a hole.
func copyData(out io.WriterAt, in *os.File, size int64) error {
	p, zeroes := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < size; {
		data, err := unix.Seek(int(in.Fd()), off, unix.SEEK_DATA)
		switch {
		case err == unix.ENXIO:
			return nil // a hole up to the end
		case err == nil:
			off = data
		}
		n, err := in.ReadAt(p[:min(int64(len(p)), size-off)], off)
		if n == 0 {
			return fmt.Errorf("read %s at %d: %w", in.Name(), off, err)
		}
		if string(p[:n]) != string(zeroes[:n]) {
			if _, err := out.WriteAt(p[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
	}
	return nil
}

// workspace is a folder that stays when the test has failed: with it the failure can be
// looked into.
func workspace(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("EROFSD_TEST_DIR"), "power-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && os.Getenv("EROFSD_GUEST") == "" {
			t.Logf("the disk as it was before, and the log, are kept in %s", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func (m *mounted) root() string { return filepath.Join(m.dir, "root") }

// await polls until ok.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited too long for: %s", what)
		}
	}
}
