package services

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/rootfs"
)

// helmVersion is pinned here: it is no dependency of the product.
const helmVersion = "v3.21.4"

// Helm returns the path of helm, which it builds once. Without it t is skipped by the gate
// helm.
func Helm(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(rootfs.CacheDir(), "helm-"+helmVersion)
	program := filepath.Join(dir, "helm")
	err := alone(func() error {
		if _, err := os.Stat(program); err == nil {
			return nil
		}
		t.Log("building helm, once")
		return goTool(t.Context(), ".", dir, "install", "-ldflags=-s -w", "helm.sh/helm/v3/cmd/helm@"+helmVersion)
	})
	if err != nil {
		testenv.Need(t, "helm", "needs helm: "+err.Error())
	}
	return program
}

// Tool returns the path of a program of internal/tools, which it builds. Without it t is
// skipped by the gate tools.
func Tool(t testing.TB, name string) string {
	t.Helper()
	dir := t.TempDir()
	if err := goTool(t.Context(), filepath.Join(testenv.ModuleRoot(t), "internal", "tools"), dir, "install", "./"+name); err != nil {
		testenv.Need(t, "tools", "needs the tools of internal/tools: "+err.Error())
	}
	return filepath.Join(dir, name)
}

// goTool runs the go command in a module of its own; what it installs goes to bin.
func goTool(ctx context.Context, module, bin string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "GOBIN="+bin, "GOFLAGS=", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("go %s: %w: %s", args[0], err, lines[len(lines)-1])
	}
	return nil
}
