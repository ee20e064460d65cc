package scenario

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// mounts are those of this machine's kernel.
type mounts struct{}

func (mounts) view(point string) fileSystem { return mounted(point) }

func (mounts) abandon(point string) error { return unix.Unmount(point, unix.MNT_DETACH) }

// A mounted is a file system by the place where it is mounted.
type mounted string

func (m mounted) path(name string) string { return filepath.Join(string(m), name) }

func (m mounted) tree() (testenv.Tree, error) { return testenv.ScanTree(string(m), true) }

func (m mounted) open(name string) (file, error) { return os.Open(m.path(name)) }

func (m mounted) mapped(name string) ([]byte, error) { return readerProcess("map", m.path(name)) }

func (m mounted) run(name string) error {
	_, err := readerProcess("run", m.path(name))
	return err
}

// readerName is argv[0] of a reader that is a process of its own. A goroutine in a page
// fault, or in fork(2), cannot be stopped for the garbage collector: when that comes
// while the reader waits, all of its process waits, and the registry of a scenario is
// in the test's.
const readerName = "erofsd-reader"

func readerProcess(operation, path string) ([]byte, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{readerName, operation, path}
	cmd.Stderr = os.Stderr
	return cmd.Output()
}

// runReader is what such a process does.
func runReader(operation, path string) error {
	if operation == "run" {
		return exec.Command(path).Run()
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(append([]byte(nil), p...))
	return err
}

// smallDisk returns a directory on a small disk of its own, for a row that has a real
// kernel; a fake's disk is only said to be full.
func (r Row) smallDisk(t testing.TB) string {
	t.Helper()
	if r.Fake {
		return scratch(t)
	}
	if base := os.Getenv("EROFSD_TEST_SMALL_DIR"); base != "" {
		dir, err := os.MkdirTemp(base, "disk-*")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	const size = 32 << 20
	mkfs := testenv.Tool(t, "mkfs.ext4")
	dir := scratch(t)
	img, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, size); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{mkfs, "-q", "-m", "0", "-F", img}, {"mount", "-o", "loop", img, mnt}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Errorf("unmount the small disk: %v", err)
		}
	})
	return mnt
}
