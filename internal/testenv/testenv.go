// Package testenv gates tests on what the machine can do and finds fixtures.
// It is for tests only.
//
// A gate that cannot be passed skips the test with one line that starts with
// "needs"; when TEST_MUST_RUN lists the gate's name (or "all") it fails the test instead, so
// that CI cannot pass by skipping.
package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Root skips t unless it runs as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Need(t, "root", "needs root")
	}
}

// Tool skips t unless the command name is installed, and returns its path.
func Tool(t testing.TB, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		Need(t, name, "needs the program "+name)
	}
	return p
}

// Kernel skips t unless supported (a probe's result) is nil. name is the
// transport or feature.
func Kernel(t testing.TB, name string, supported error) {
	t.Helper()
	if supported != nil {
		Need(t, name, "needs a kernel with "+name+": "+supported.Error())
	}
}

// Fixtures returns the folder of nydus's own images, ../shared/fixtures/rafs-v6
// beside the checkout or $EROFSD_FIXTURES, and skips t when there is none.
func Fixtures(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("EROFSD_FIXTURES")
	if dir == "" {
		dir = filepath.Join(ModuleRoot(t), "..", "shared", "fixtures", "rafs-v6")
	}
	if _, err := os.Stat(filepath.Join(dir, "tree.jsonl")); err != nil {
		Need(t, "fixtures", "needs the fixture images: set EROFSD_FIXTURES to their folder")
	}
	return dir
}

// ModuleRoot returns the folder that holds go.mod.
func ModuleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("no go.mod above the test's folder")
		}
		dir = up
	}
}

// Need skips t, or fails it when TEST_MUST_RUN lists gate; why starts with "needs".
// It is for what the other gates do not cover.
func Need(t testing.TB, gate, why string) {
	t.Helper()
	t.Helper()
	for _, g := range strings.Split(os.Getenv("TEST_MUST_RUN"), ",") {
		if g == gate || g == "all" {
			t.Fatalf("%s, and TEST_MUST_RUN says that %q must run here", why, gate)
		}
	}
	t.Skip(why)
}
