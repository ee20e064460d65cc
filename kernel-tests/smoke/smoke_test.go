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
		{"F1", "", testF1},
		{"F4", "", testF4},
		{"F5", "", testF5},
		{"F7", "", testF7},
		{"F8", "", testF8},
		{"F9", "", testF9},
		{"F10", "", testF10},
		{"F14", "", testF14},
		{"F17", "", testF17},
		{"F15", "", testF15},
		{"HotUpgrade.TestHotUpgrade", "", testHotUpgrade},
		{"Takeover.TestFailover", "", testFailover},
		{"RestoreWithoutBootstrap", c, testRestore},
		{"UnmountByOthers", "", testUserUnmounts},
		{"SnapshotterSequence", "", testSequence},
		{"NewPassword", "", testNewPassword},
		{"DeleteWhileMounted", "", testDeleteMounted},
		{"CullWhileMounted", "", testCullMounted},
		{"SharedBlobFirstRemoved", "", testSharedBlob},
		{"RestartWithRecords", "", testRecords},
		{"DamagedChunkTable", "", testDamagedTable},
		{"ConcurrentPuts", "", testConcurrentPuts},
		{"BindDuringUnbind", "", testBindDuringUnbind},
		{"MountDuringUnbind", "", testMountDuringUnbind},
		{"ManyBound", "", testManyBound},
		{"FileLimit1024", "", testFileLimit},
		{"NoCapSysResource", daemon.Fanotify, testNoSysResource},
		{"DeviceHeld", c, testDeviceHeld},
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
