package erofsd

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) {
	if IsCalled(os.Args) || filepath.Base(os.Args[0]) == "nydusd" {
		os.Exit(Main())
	}
	if os.Args[0] == landlessName {
		panic(runLandless(os.Args[1:]))
	}
	testenv.Main(m)
}

// erofsd runs it with args, which must end it soon, and returns what it printed.
func erofsd(t *testing.T, as *syscall.Credential, args ...string) (said string, code int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{Name}, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer stop.Stop()
	_ = cmd.Wait() // the code says it
	return out.String(), cmd.ProcessState.ExitCode()
}

// files lists everything below dir.
func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		names = append(names, name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// refused runs singleton in dir, which must end with one error that says want, and
// change nothing there.
func refused(t *testing.T, as *syscall.Credential, base, dir, want string, args ...string) {
	t.Helper()
	before := files(t, base)
	args = append([]string{"singleton", "--fscache", dir, "--root", filepath.Join(base, "root"), "--socket", filepath.Join(base, "sock")}, args...)
	said, code := erofsd(t, as, args...)
	if code != 1 || !strings.Contains(said, want) {
		t.Errorf("exit code %d, and it said %q; want %q in it", code, said, want)
	}
	if n := strings.Count(said, "erofsd: "); n != 1 {
		t.Errorf("%d errors: %q", n, said)
	}
	if after := files(t, base); len(after) != len(before) {
		t.Errorf("files before %q, after %q", before, after)
	}
}

func testDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("EROFSD_TEST_DIR"), "erofsd-cmd-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestSingletonWithoutFeature(t *testing.T) {
	if _, err := os.Stat(cachefiles.DevicePath); err == nil {
		t.Skip("this kernel has it: see TestSingletonRefused")
	}
	dir := testDir(t)
	refused(t, nil, dir, dir, "not supported by this kernel: needs CONFIG_CACHEFILES_ONDEMAND")
}

// TestSingletonRefused: one clear error for each thing that can be wrong.
func TestSingletonRefused(t *testing.T) {
	testenv.Root(t)
	base := testDir(t)
	testenv.Kernel(t, "cachefiles", cachefiles.Supported("", base))
	cache := filepath.Join(base, "cache")
	file := filepath.Join(base, "file")
	if err := os.Mkdir(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("missing directory", func(t *testing.T) {
		refused(t, nil, base, filepath.Join(base, "none"), "create the directory first")
	})
	t.Run("a file", func(t *testing.T) { refused(t, nil, base, file, "not a directory") })
	t.Run("tmpfs", func(t *testing.T) { refused(t, nil, base, "/dev", "ext4, xfs or btrfs") })
	t.Run("unprivileged", func(t *testing.T) {
		if err := os.Chmod(base, 0o755); err != nil {
			t.Fatal(err)
		}
		refused(t, &syscall.Credential{Uid: 65534, Gid: 65534}, base, cache, "root")
	})
	t.Run("full", func(t *testing.T) {
		small := os.Getenv("EROFSD_TEST_SMALL_DIR")
		if small == "" {
			testenv.Need(t, "small file system", "needs a small file system in $EROFSD_TEST_SMALL_DIR")
		}
		fill(t, small)
		refused(t, nil, small, small, "full")
	})
	t.Run("device busy", func(t *testing.T) {
		d, err := cachefiles.Open("")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		refused(t, nil, base, cache, "another daemon has it")
	})
	// A tag or a directory that is in use needs a second live cache, and so a second
	// device, which no kernel has: cachefiles' tests show the answer with a fake.
}

// fill leaves no block of dir's file system free until the test ends.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.CreateTemp(dir, "filler-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		os.Remove(f.Name())
	})
	for n := 1 << 20; n >= 512; {
		if _, err := f.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	if err := f.Sync(); err != nil && !strings.Contains(err.Error(), "no space") {
		t.Fatal(err)
	}
}
