package scenario

import (
	"os"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) {
	if IsProcess(os.Args) {
		os.Exit(Process(os.Args))
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
