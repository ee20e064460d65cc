package e2e

import (
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// TestE2E runs everything over one image: TestE2E/GROUP/TEST.
func TestE2E(t *testing.T) {
	w := newWorld(t)
	t.Run("registry", w.registries)
	t.Run("store", w.stores)
	t.Run("outage", w.outages)
	t.Run("dragonfly", w.dragonflies)
	t.Run("fault", w.faults)
}
