package services

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/debian"
	"github.com/erofsd/erofsd/kernel-tests/rootfs"
)

// alone calls f while no other process is in it: packages of tests run side by side.
func alone(f func() error) error {
	dir := rootfs.CacheDir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "services.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	return f()
}

// need returns the path of a program, which it installs where it can. Else t is
// skipped by the gate that is called like the package.
func need(t testing.TB, tool debian.Tool) string {
	t.Helper()
	if path, err := exec.LookPath(tool.Program); err == nil {
		return path
	}
	err := alone(func() error {
		return debian.Ensure(t.Context(), func(s string) { t.Log(s) }, tool)
	})
	if err != nil {
		testenv.Need(t, tool.Package, "needs "+tool.Package+": "+err.Error())
	}
	path, err := exec.LookPath(tool.Program)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// versitygwVersion is pinned here: it is no dependency of the product.
const versitygwVersion = "v1.8.0"

// versitygw returns the path of that program, which it builds once.
func versitygw(t testing.TB) string {
	t.Helper()
	if path, err := exec.LookPath("versitygw"); err == nil {
		return path
	}
	return filepath.Join(goInstalled(t, "versitygw", versitygwVersion, "github.com/versity/versitygw/cmd/versitygw"), "versitygw")
}

// goInstalled returns the directory with programs of a module at a version, which it builds
// once, or skips t by the gate name. They are called like their packages.
func goInstalled(t testing.TB, name, version string, packages ...string) (dir string) {
	t.Helper()
	dir = filepath.Join(rootfs.CacheDir(), name+"-"+version)
	err := alone(func() error {
		for _, p := range packages {
			if _, err := os.Stat(filepath.Join(dir, filepath.Base(p))); err != nil {
				t.Logf("building %s %s, once", name, version)
				return install(t.Context(), dir, version, packages)
			}
		}
		return nil
	})
	if err != nil {
		testenv.Need(t, name, "needs "+name+" "+version+": "+err.Error())
	}
	return dir
}

// install builds packages of one module into dir.
func install(ctx context.Context, dir, version string, packages []string) error {
	args := []string{"install", "-ldflags=-s -w"}
	for _, p := range packages {
		args = append(args, p+"@"+version)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("go install: %w: %s", err, lines[len(lines)-1])
	}
	return nil
}
