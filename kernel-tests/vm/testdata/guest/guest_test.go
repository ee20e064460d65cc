// Package guest is what the tests of vm run in a guest.
package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestPass looks at everything that vm promises to a program.
func TestPass(t *testing.T) {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if row := os.Getenv("EROFSD_GUEST"); err != nil || !strings.HasPrefix(string(release), row+".") {
		t.Errorf("the kernel is %q, %v, want %s", release, err, row)
	}
	if _, err := os.Stat("guest_test.go"); err != nil {
		t.Errorf("the folder of the package is not the working directory: %v", err)
	}
	if err := os.WriteFile("new", nil, 0o600); err == nil {
		t.Error("the host's files can be written")
	}
	for _, name := range []string{"EROFSD_TEST_DIR", "EROFSD_TEST_SMALL_DIR", "TMPDIR"} {
		var fs syscall.Statfs_t
		const ext4 = 0xef53
		if err := syscall.Statfs(os.Getenv(name), &fs); err != nil || fs.Type != ext4 {
			t.Errorf("%s=%s has the type %#x, %v, want ext4", name, os.Getenv(name), fs.Type, err)
		}
	}
	if _, err := os.Stat("/dev/cachefiles"); err != nil {
		t.Error(err)
	}
	if fixtures := os.Getenv("EROFSD_FIXTURES"); strings.Contains(os.Getenv("TEST_MUST_RUN"), "fixtures") {
		if _, err := os.Stat(filepath.Join(fixtures, "tree.jsonl")); err != nil {
			t.Error(err)
		}
	}
	for i := range 20000 {
		fmt.Println("line", i)
	}
	fmt.Fprintln(os.Stderr, "to standard error")
}

func TestFail(t *testing.T) { t.Error("this one fails") }

// TestOrphan leaves a process behind that holds the output.
func TestOrphan(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run", "^TestHang$")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// TestComplaint passes, and the kernel has something to say.
func TestComplaint(t *testing.T) {
	if err := os.WriteFile("/dev/kmsg", []byte("WARNING: this is a test\n"), 0); err != nil {
		t.Fatal(err)
	}
}

// TestPanic ends the kernel.
func TestPanic(t *testing.T) {
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Hour)
}

func TestHang(*testing.T) { time.Sleep(time.Hour) }
