package failpoint_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// Every place in the tree has a name in the list, once, and the other way round.
func TestNamesAreComplete(t *testing.T) {
	root := testenv.ModuleRoot(t)
	var found []string
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || strings.Contains(name, "/testdata/") {
			return err
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			if place, ok := hit(n); ok {
				if place == "" {
					t.Errorf("%s: a name that is not a constant", name)
				}
				found = append(found, place)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(found)
	if !slices.Equal(found, failpoint.Names) {
		t.Errorf("the tree hits\n%q\nand failpoint.Names is\n%q", found, failpoint.Names)
	}
}

// hit reports whether n is a call of failpoint.Hit, and of which name.
func hit(n ast.Node) (name string, ok bool) {
	call, ok := n.(*ast.CallExpr)
	if !ok || len(call.Args) != 1 {
		return "", false
	}
	f, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || f.Sel.Name != "Hit" {
		return "", false
	}
	if p, ok := f.X.(*ast.Ident); !ok || p.Name != "failpoint" {
		return "", false
	}
	if lit, ok := call.Args[0].(*ast.BasicLit); ok {
		name, _ = strconv.Unquote(lit.Value)
	}
	return name, true
}

func TestActions(t *testing.T) {
	place := failpoint.Names[0]
	on, off := build(t, "-tags=failpoint"), build(t)
	for _, c := range []struct {
		program, points string
		hits            int
		want            string // the last line on stdout, or how it ended
	}{
		{off, place + "=kill", 3, "3"},
		{on, "", 3, "3"},
		{on, place + "=kill@4", 3, "3"},
		{on, place + "=kill", 1, "signal: killed"},
		{on, place + "=kill@3", 3, "signal: killed"},
		{on, place + "=segv", 1, "exit status 2"},
		{on, place + "=oom", 1, "exit status 2"}, // nothing limits it
		{on, place + "=exit@2", 2, "exit status 1"},
		{on, place + "=panic", 1, "exit status 2"},
		{on, place + "=kill," + place + "=kill", 1, "exit status 2"},
		{on, "nowhere=kill", 1, "exit status 2"},
		{on, place + "=kill@0", 1, "exit status 2"},
		{on, place + "=kill@x", 1, "exit status 2"},
		{on, place, 1, "exit status 2"},
	} {
		cmd := exec.Command(c.program, place, strconv.Itoa(c.hits))
		cmd.Env = append(os.Environ(), "EROFSD_FAILPOINT="+c.points)
		out, err := cmd.Output()
		got := strings.TrimSpace(string(out))
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s, %d hits: %q, want %q", c.points, c.hits, got, c.want)
		}
	}
}

func TestStop(t *testing.T) {
	place := failpoint.Names[0]
	cmd := exec.Command(build(t, "-tags=failpoint"), place, "2")
	cmd.Env = append(os.Environ(), "EROFSD_FAILPOINT="+place+"=stop@2")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var st syscall.WaitStatus
	if _, err := syscall.Wait4(cmd.Process.Pid, &st, syscall.WUNTRACED, nil); err != nil || !st.Stopped() {
		t.Errorf("not stopped: %v, %v", st, err)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// build builds testdata/hit, which hits a place some times and says how often it did.
func build(t *testing.T, flags ...string) string {
	t.Helper()
	testenv.Tool(t, "go")
	program := filepath.Join(t.TempDir(), "hit")
	args := append([]string{"build", "-o", program}, flags...)
	if out, err := exec.Command("go", append(args, "./testdata/hit")...).CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return program
}
