package containerd

import (
	"slices"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// An item is a test that nydus-snapshotter's catalogue has (snapshotter-surface 7), and where
// it is here.
type item struct {
	name string
	// here is a case of this package, as life or pods/life, or a folder and a function of its
	// tests, as "snapshotter TestX". Empty: why.
	here string
	why  string // it is not tested, or not as it is there
}

// catalogue has sections 7.1 and 7.3, and of 7.2 what is the snapshotter's.
var catalogue = []item{
	{"start_single_container_multiple_daemons", "life", "one daemon serves all images: none has one of its own"},
	{"start_multiple_containers_multiple_daemons", "sharing", "one daemon; what is left of images is looked at after every case"},
	{"start_multiple_containers_shared_daemon", "sharing", ""},
	{"pull_remove_one_image", "life", "twice"},
	{"pull_remove_multiple_images", "race", "removed while containers of it start and another is pulled"},
	{"only_restart_snapshotter", "killed", ""},
	{"kill_snapshotter_and_nydusd_recover", "killed", ""},
	{"ctr_snapshot_usage", "usage", ""},
	{"start_container_on_oci", "ordinary", ""},
	{"start_container_with_referrer_detect", "", "the lazy form of an image is not looked for among its referrers"},
	{"kill_nydusd_recover_nydusd", "dead", ""},
	{"kill_multiple_nydusd_recover_failover", "killed", "one daemon, whose keeper has what the next one needs"},
	{"start_multiple_containers_shared_daemon_fscache", "kernel-tests/smoke TestSmoke", "nydus-snapshotter's calls in guests with cachefiles, without a container"},
	{"fscache_kill_snapshotter_and_nydusd_recover", "kernel-tests/smoke Takeover.TestFailover", "of the daemon, in guests with cachefiles"},
	{"fscache_kill_nydusd_failover", "kernel-tests/smoke Takeover.TestFailover", "in guests with cachefiles"},
	{"start_single_container_on_stargz", "", "eStargz images are unpacked as the ordinary images that they are too"},
	{"no report of a race", "", "programs that are processes have no detector here; make race runs their packages with it"},

	{"kind: login by the CRI's proxy", "pods/login", ""},
	{"kind: login by secrets of a kubeconfig", "internal/keychain TestSecrets", "with an API server of the test's"},
	{"kind: a pod from a private registry", "pods/login", ""},
	{"kind: index detection", "", "images are lazy by their own manifest"},
	{"hot upgrade and takeover of the daemon", "kernel-tests/torture TestUpgrade", "readers without containers"},
	{"store upgrade", "snapshotter TestNydusRoot", ""},

	{"128-layer image", "deep", ""},
	{"two namespaces", "namespaces", ""},
	{"two refs, one manifest", "references", ""},
	{"same blobs in different order (shared-blob GC)", "sharing", "images that share two of three layers; the first is removed"},
	{"remove while starting", "race", ""},
	{"pull while GC", "race", ""},
	{"disk full in cache", "kernel-tests/scenario cache-full", ""},
	{"disk full in metadata, and while a bootstrap is unpacked", "", "not tried"},
	{"kill -9 at every step of Prepare", "snapshotter TestStartAfterCrash", "what a crash can leave on the disk; killed at random moments: churn"},
	{"daemon stopped (hung)", "snapshotter TestHungDaemon", ""},
	{"registry 401/403/404/416/429/5xx, slow, short body, wrong bytes", "kernel-tests/torture TestLyingRegistry", "and backend/registry's table"},
	{"token expiry in the middle", "cmd/containerd-erofsd-grpc TestLogins", "of a password; tokens: kernel-tests/e2e"},
	{"mirror dies in the middle", "kernel-tests/e2e outages", ""},
	{"clock jump", "", "nothing that is decided here depends on the wall clock"},
	{"reboot with the registry down", "snapshotter TestRecover", "mounts come back from the disk; kernel-tests/systemd boots"},
	{"snapshotter downgrade", "", "there is one format of what it writes"},
	{"foreign or corrupt bootstrap", "snapshotter TestTornBootstrap", "and the fuzz targets of erofs"},
	{"user namespace", "shifted", "containerd 2"},
	{"View by ctr image mount", "mounted", "containerd 2; view: the same calls, below 1.6 too"},
	{"Kata volume JSON", "", "there is nothing for Kata"},
	{"containerd 1.6 and 2.4, local pull and transfer", "transfer", "pods, pods-by-transfer; of 1.7, 2.0 to 2.3 no test"},
	{"containerd's metadata wiped on either side", "snapshotter TestLostStore", "on ours"},
	{"the official snapshotter suite", "snapshotter TestSuite", ""},
}

// TestCatalogue: what the catalogue says is somewhere is there, and nothing is without a
// reason.
func TestCatalogue(t *testing.T) {
	var ours []string
	for _, c := range alone {
		ours = append(ours, c.name)
	}
	for _, c := range together {
		ours = append(ours, c.name)
	}
	for _, c := range ofPods {
		ours = append(ours, "pods/"+c.name)
	}
	for _, i := range catalogue {
		folder, name, elsewhere := strings.Cut(i.here, " ")
		switch {
		case i.here == "":
			if i.why == "" {
				t.Errorf("%s is neither here nor has a reason not to be", i.name)
			}
			t.Logf("not here: %s: %s", i.name, i.why)
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
