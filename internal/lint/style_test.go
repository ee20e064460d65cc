package lint

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// maxLines is how long a file of code may be. A longer one is two files.
const maxLines = 400

// longFiles may be longer, each for a reason.
var longFiles = map[string]string{}

func TestVet(t *testing.T) {
	t.Parallel()
	run(t, "vet", "./...")
}

func TestStaticcheck(t *testing.T) {
	t.Parallel()
	run(t, "tool", tools(t), "staticcheck", "./...")
}

func TestGofumpt(t *testing.T) {
	t.Parallel()
	if out := run(t, "tool", tools(t), "gofumpt", "-l", "."); len(out) > 0 {
		t.Errorf("not formatted as gofumpt does (go tool %s gofumpt -w FILE):\n%s", tools(t), out)
	}
}

// tools returns the flag that selects the tools' own module, and skips t when the
// module is neither in the cache nor to be had.
func tools(t *testing.T) string {
	t.Helper()
	const modfile = "-modfile=internal/tools/go.mod"
	cmd := exec.Command("go", "mod", "download")
	cmd.Dir = filepath.Join(testenv.ModuleRoot(t), "internal", "tools")
	if out, err := cmd.CombinedOutput(); err != nil {
		testenv.Need(t, "tools", "needs the tools of internal/tools: "+string(bytes.TrimSpace(out)))
	}
	return modfile
}

// run runs the go command in the module's root; it fails t with the output when
// the command fails.
func run(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = testenv.ModuleRoot(t)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func TestFiles(t *testing.T) {
	root := testenv.ModuleRoot(t)
	files := 0
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		if d.IsDir() && (rel == ".git" || rel == "bin" || rel == "build") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		files++
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		for _, mark := range []string{"TO" + "DO", "FIX" + "ME", "XX" + "X:"} {
			if bytes.Contains(text, []byte(mark)) {
				t.Errorf("%s has a %s: do it, or file an issue", rel, mark)
			}
		}
		lines := bytes.Count(text, []byte("\n"))
		if lines > maxLines && !strings.HasSuffix(name, "_test.go") && longFiles[rel] == "" {
			t.Errorf("%s has %d lines, more than %d: split it where a reader would", rel, lines, maxLines)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Errorf("no Go file below %s", root)
	}
}
