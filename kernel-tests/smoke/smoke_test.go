package smoke

import (
	"testing"

	"github.com/erofsd/erofsd/internal/daemon"
)

// A smokeCase is something that must work, by its name in the catalogue.
type smokeCase struct {
	name string
	only string // transport; "": both
	run  func(t *testing.T, r row)
}

func cases() []smokeCase {
	const c = daemon.Cachefiles
	return []smokeCase{
		{"TestDaemonStatus", "", testDaemonStatus},
		{"TestMetrics", "", testMetrics},
		{"TestPrefetch", "", testPrefetch},
		{"TestSubMountCache", "", testSubMountCache},
		{"TestNestedMountpointStatAfterRemount", "", testNestedMountpoint},
		{"TestMount", "", testMount},
		{"TestHotReloadConfig", "", testHotReloadConfig},
	}
}

// TestSmoke runs every case on every row: TestSmoke/TRANSPORT/CASE.
func TestSmoke(t *testing.T) {
	images := newImages(t)
	for _, name := range []string{daemon.Fanotify, daemon.Cachefiles} {
		r := row{name, images}
		t.Run(name, func(t *testing.T) {
			r.need(t)
			for _, c := range cases() {
				if c.only == "" || c.only == name {
					t.Run(c.name, func(t *testing.T) { c.run(t, r) })
				}
			}
		})
	}
}
