package testenv

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"testing"
)

// Declares reports whether the Go files of a folder of this module declare a function of that
// name, or have the name as a string: a catalogue of tests says where they are, and this that
// they are there.
func Declares(t testing.TB, folder, name string) (found bool) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(ModuleRoot(t), folder, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no Go files in %s: %v", folder, err)
	}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				found = found || n.Name.Name == name
			case *ast.BasicLit:
				found = found || n.Value == `"`+name+`"`
			}
			return !found
		})
	}
	return found
}
