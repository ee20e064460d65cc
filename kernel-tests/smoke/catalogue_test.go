package smoke

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// An item is a test that nydus's catalogue has (nydusd-surface 12.2 to 12.4 and 12.6), and
// where it is here.
type item struct {
	name string
	// here is a case of this package, or a folder and a function of its tests, as
	// "cachefiles TestX", or "scenario NAME" for one of kernel-tests/scenario. Empty: why.
	here string
	why  string // it is not tested, or not as it is there
}

// catalogue lists what touches the singleton mode, the backends or the API.
var catalogue = []item{
	{"F1", "F1", "without a container; every path, attribute and byte of the root"},
	{"F2", "", "images that leave their layers as they are (zran) are not read yet"},
	{"F3", "", "a build of Linux in a guest takes hours; scenario whole-tree and internal/daemon TestParallelReaders have the many small reads"},
	{"F4", "F4", ""},
	{"F5", "F5", ""},
	{"F6", "Takeover.TestFailover", ""},
	{"F7", "F7", ""},
	{"F8", "F8", ""},
	{"F9", "F9", ""},
	{"F10", "F10", ""},
	{"F11", "cachefiles TestParse", ""},
	{"F12", "cachefiles TestKeyPath", ""},
	{"F13", "TestConformance", "blobs.txt"},
	{"F14", "F14", "a cache is always there, see cull-unsupported"},
	{"F15", "F15", ""},
	{"F16", "TestConformance", "routes.txt, connections.txt, daemon.txt and others"},
	{"F17", "F17", "tarfs is refused as everything without chunk tables"},

	{"TestDaemonStatus", "TestDaemonStatus", ""},
	{"TestMetrics", "TestMetrics", "the kernel reads files, so nobody counts operations on them; the words about an unknown counter are kept"},
	{"TestPrefetch", "TestPrefetch", ""},
	{"TestSubMountCache", "TestSubMountCache", ""},
	{"TestNestedMountpointStatAfterRemount", "TestNestedMountpointStatAfterRemount", ""},
	{"TestMount", "TestMount", ""},
	{"TestHotReloadConfig", "TestHotReloadConfig", ""},

	{"HotUpgrade.TestHotUpgrade", "HotUpgrade.TestHotUpgrade", "three in a row"},
	{"Takeover.TestFailover", "Takeover.TestFailover", "two in a row; images are read, there is no container"},
	{"Takeover.TestRestartSnapshotterHotUpgrade", "", "it is a test of the snapshotter; HotUpgrade.TestHotUpgrade has the daemon's part"},
	{"Takeover.TestAPIHotUpgrade", "", "it is a test of the snapshotter; HotUpgrade.TestHotUpgrade has the daemon's part"},

	{"kill -9 at every step of PUT, OPEN and READ", "scenario kill-during-open", "and kill-while-reading there; of PUT: RestartWithRecords"},
	{"failover with 50 images", "Takeover.TestFailover", "with 12: processors in a guest are emulated"},
	{"two images sharing blobs, remove the first", "SharedBlobFirstRemoved", ""},
	{"cull while mounted, then umount", "CullWhileMounted", ""},
	{"200 concurrent PUTs", "ConcurrentPuts", ""},
	{"clock jump", "", "nothing that the daemon decides depends on the wall clock but the age of records"},
	{"cachefilesd started by the distribution", "DeviceHeld", ""},
	{"kernel without on-demand", "internal/erofsd TestSingletonWithoutFeature", ""},
	{"file descriptor limit 1024", "FileLimit1024", ""},
	{"container without CAP_SYS_RESOURCE", "NoCapSysResource", ""},
	{"cache disk full", "scenario cache-full", ""},
	{"blob.meta truncated on disk", "DamagedChunkTable", ""},
	{"token expiry in the middle of a read", "NewPassword", "of a password here; of tokens in backend/registry and kernel-tests/e2e"},
	{"registry down, redirects expired, Range ignored, bodies truncated or wrong, slow", "scenario wrong-bytes", "and the fault table of each backend, and kernel-tests/e2e"},
}

// TestCatalogue: what the catalogue says is somewhere is there, and nothing is without a
// reason.
func TestCatalogue(t *testing.T) {
	var ours []string
	for _, c := range cases() {
		ours = append(ours, c.name)
	}
	ours = append(ours, "TestConformance")
	for _, i := range catalogue {
		folder, name, elsewhere := strings.Cut(i.here, " ")
		switch {
		case i.here == "":
			if i.why == "" {
				t.Errorf("%s is neither here nor has a reason not to be", i.name)
			}
			t.Logf("not here: %s: %s", i.name, i.why)
		case folder == "scenario":
			if !testenv.Declares(t, filepath.Join("kernel-tests", folder), name) {
				t.Errorf("%s: kernel-tests/scenario has no scenario %s", i.name, name)
			}
		case elsewhere:
			if !testenv.Declares(t, folder, name) {
				t.Errorf("%s: %s has no test %s", i.name, folder, name)
			}
		case !slices.Contains(ours, i.here):
			t.Errorf("%s: there is no case %s", i.name, i.here)
		}
	}
	for n, name := range ours {
		if slices.Contains(ours[:n], name) {
			t.Errorf("two cases are called %s", name)
		}
	}
}
