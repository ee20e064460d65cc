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
	dir := filepath.Join(rootfs.CacheDir(), "versitygw-"+versitygwVersion)
	program := filepath.Join(dir, "versitygw")
	err := alone(func() error {
		if _, err := os.Stat(program); err == nil {
			return nil
		}
		t.Log("building versitygw, once")
		return install(t.Context(), dir)
	})
	if err != nil {
		testenv.Need(t, "versitygw", "needs versitygw: "+err.Error())
	}
	return program
}

// install builds versitygw into dir, in a module of its own.
func install(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "install", "-ldflags=-s -w", "github.com/versity/versitygw/cmd/versitygw@"+versitygwVersion)
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("go install: %w: %s", err, lines[len(lines)-1])
	}
	return nil
}
