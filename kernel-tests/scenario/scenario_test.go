package scenario

import (
	"flag"
	"os"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) {
	if IsProcess(os.Args) {
		os.Exit(Process(os.Args))
	}
	flag.Parse()
	// A fake disk that is full is a limit on the size of this process's files, so
	// testing must not write its list of opened files, which is for its cache only.
	if err := flag.Set("test.testlogfile", ""); err != nil {
		panic(err)
	}
	testenv.Main(m)
}

// TestScenarios runs every scenario on every row: TestScenarios/ROW/SCENARIO.
func TestScenarios(t *testing.T) {
	for _, r := range Rows(NewImages(t)) {
		t.Run(r.Name, func(t *testing.T) {
			r.need(t)
			for _, s := range All() {
				t.Run(s.Name, func(t *testing.T) { s.Run(t, r) })
			}
		})
	}
}
