package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

// TestBootsGuests is run by make test when the kernels have been built.
func TestBootsGuests(t *testing.T) {
	const row = "6.1"
	_, err := guestkernel.Find(t.Context(), row)
	if errors.Is(err, fs.ErrNotExist) {
		testenv.Need(t, "kernel-"+row, "needs the guest kernel "+row+": make kernel builds it")
	}
	if err != nil {
		t.Fatal(err)
	}
	testenv.Tool(t, qemuProgram)
	dir := t.TempDir()
	vm, tests := filepath.Join(dir, "vm"), filepath.Join(dir, "guest.test")
	build(t, "build", "-o", vm, ".")
	build(t, "test", "-c", "-o", tests, "./testdata/guest")
	for name, tc := range map[string]struct {
		args   []string
		code   int
		stdout string // ends with
		stderr []string
	}{
		"pass":      {[]string{tests, "-test.run=TestPass"}, 0, "line 19999\nPASS\n", []string{"to standard error\n"}},
		"fail":      {[]string{tests, "-test.run=TestFail"}, 1, "this one fails\nFAIL\n", nil},
		"orphan":    {[]string{tests, "-test.run=TestOrphan"}, 0, "PASS\n", nil},
		"complaint": {[]string{tests, "-test.run=TestComplaint"}, 1, "PASS\n", []string{"complains (WARNING:)", "WARNING: this is a test"}},
		"panic":     {[]string{tests, "-test.run=TestPanic"}, exitProblem, "", []string{"without a result", "Kernel panic"}},
		"hang":      {[]string{"-timeout=20s", tests, "-test.run=TestHang"}, 2, "", []string{"guest.TestHang", "stopped after 20s", "Show Blocked State"}},
		"missing":   {[]string{"no-such-program"}, exitProblem, "", []string{"find the program in the guest"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), vm, append([]string{"-kernel", row}, tc.args...)...)
			cmd.Dir = filepath.Join("testdata", "guest")
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
				t.Fatal(err)
			}
			if code := cmd.ProcessState.ExitCode(); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if !strings.HasSuffix(stdout.String(), tc.stdout) {
				t.Errorf("standard output does not end with %q", tc.stdout)
			}
			for _, want := range tc.stderr {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("standard error has no %q", want)
				}
			}
			if name == "pass" && strings.Count(stdout.String(), "\nline ") != 19999 {
				t.Error("lines are missing")
			}
			if t.Failed() {
				t.Logf("standard output ends:\n%s\nstandard error:\n%s", stdout.Bytes()[max(0, stdout.Len()-2000):], stderr.Bytes())
			}
		})
	}
}

// build runs the go command for programs that run in a guest.
func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
