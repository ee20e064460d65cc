package scenario

import (
	"slices"
	"testing"
)

// A Scenario is something that happens, and what must come of it.
type Scenario struct {
	Name string // in kebab case
	Run  func(t *testing.T, r Row)
}

// All returns every scenario.
func All() []Scenario {
	return slices.Concat(mounting(), reading(), faults(), sharing(), lifecycle())
}

// A Row is one way to one kernel.
type Row struct {
	Name      string
	Transport string // as internal/daemon calls it
	Fake      bool

	images *Images
}

// Rows are all rows. They take their images from one place, because making images
// takes longer than most scenarios.
func Rows(images *Images) []Row {
	return []Row{
		{"fake-cachefiles", cachefilesTransport, true, images},
		{"fake-fanotify", fanotifyTransport, true, images},
		{"fanotify", fanotifyTransport, false, images},
		{"cachefiles", cachefilesTransport, false, images},
	}
}
