package containerd

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// A flowItem is a case, a requirement or a defect of snapshotter-surface, and what shows here
// that it is as it should be.
type flowItem struct {
	name string
	// here has folders and functions or cases of their tests: "snapshotter TestX", several with
	// commas. Empty: why.
	here string
	why  string // it is not tested, or not as it is there
}

// The folders of most tests.
const (
	inSnapshotter = "snapshotter "
	inCmd         = "cmd/containerd-erofsd-grpc "
	inE2E         = "kernel-tests/e2e "
	inContainerd  = "kernel-tests/containerd "
	inDaemon      = "internal/daemon "
)

// flowCases are those of 7.3, which nobody has.
func flowCases() []flowItem {
	return []flowItem{
		{"128-layer image", inSnapshotter + "TestManyLayers, " + inSnapshotter + "TestSuite", ""},
		{"two namespaces", inSnapshotter + "TestLazyImage, " + inContainerd + "life", ""},
		{"two refs, one manifest", inSnapshotter + "TestTwoReferences", ""},
		{"same blobs in different order (shared-blob GC)", inContainerd + "life, kernel-tests/smoke SharedBlobFirstRemoved, " + inDaemon + "TestRemove", "the order of blobs is in the bootstrap alone; removal goes by their digests"},
		{"remove while starting", inSnapshotter + "TestPullWhileCollecting, " + inDaemon + "TestMountWithdrawn", ""},
		{"pull while GC", inSnapshotter + "TestPullWhileCollecting", ""},
		{"disk full in cache", inDaemon + "TestDiskFull, blobmgr TestFullDisk", ""},
		{"disk full in metadata", inSnapshotter + "TestDiskFull", ""},
		{"disk full during bootstrap unpack", inSnapshotter + "TestDiskFull", ""},
		{"kill -9 at every step of Prepare", inSnapshotter + "TestStartAfterCrash, " + inContainerd + "churn", "at random moments; a step is one transaction or one rename, and what lies between is in TestStartAfterCrash"},
		{"daemon SIGSTOP (hung)", inCmd + "TestHungDaemon, " + inSnapshotter + "TestHungDaemon, " + inSnapshotter + "TestHungForEver", ""},
		{"registry 401", inCmd + "TestBadRegistry, " + inCmd + "401", ""},
		{"registry 403", inCmd + "TestBadRegistry, " + inCmd + "403", ""},
		{"registry 404", inCmd + "TestBadRegistry, " + inCmd + "404: missing blob", ""},
		{"registry 416", inCmd + "TestBadRegistry, " + inCmd + "416", ""},
		{"registry 429", inCmd + "TestBadRegistry, " + inCmd + "429", ""},
		{"registry 5xx", inCmd + "TestBadRegistry, " + inCmd + "500, " + inCmd + "503", ""},
		{"registry slow-loris", inCmd + "TestBadRegistry, " + inCmd + "slow-loris, " + inCmd + "nothing is sent", ""},
		{"registry short body", inCmd + "TestBadRegistry, " + inCmd + "short body, " + inCmd + "gone in the middle", ""},
		{"registry wrong bytes", inCmd + "TestBadRegistry, " + inCmd + "wrong bytes", ""},
		{"token expiry mid-run", inCmd + "TestLogins, " + inE2E + "tokenExpires", ""},
		{"mirror dies mid-run", inE2E + "mirrorOutage", ""},
		{"clock jump", "", "nothing is decided by the wall clock but when a login is asked for again, which a refusal does too (" + inCmd + "TestLogins)"},
		{"reboot with registry down", inCmd + "TestReboot", "processes and mounts are gone; a real power cut is in kernel-tests/power, for the daemon"},
		{"snapshotter downgrade", inSnapshotter + "TestNewerStore", ""},
		{"foreign/corrupt bootstrap (fuzz)", inCmd + "TestBrokenBootstrap, " + inSnapshotter + "TestBadImage, " + inSnapshotter + "TestTornBootstrap, erofs FuzzCheck", ""},
		{"user namespace pod", inSnapshotter + "TestShiftedLazy, " + inSnapshotter + "TestShiftedIDs", ""},
		{"View by buildkit and `ctr image mount`", inSnapshotter + "TestUnpackView, " + inSnapshotter + "TestLazyImage, " + inSnapshotter + "TestLayerOverLazy", "of a layer with data alone there is no view: it is refused"},
		{"Kata volume JSON golden", "", "Kata's volumes are not made: its keys are refused or have no effect (" + inCmd + "TestNydusKeys)"},
		{"containerd 1.7, 2.0, 2.1, 2.2, 2.3 with local pull and transfer", inContainerd + "TestContainerd", "Debian's 1.6 here, and whichever containerd PATH has"},
		{"containerd metadata wiped on either side", inSnapshotter + "TestContainerdWiped, " + inSnapshotter + "TestOursWiped, " + inSnapshotter + "TestLostStore", ""},
		{"the official snapshotter suite", inSnapshotter + "TestSuite", ""},
	}
}

// flowRequirements are the rows of 8.1.
func flowRequirements() []flowItem {
	return []flowItem{
		{"Support shared domain for erofs+fscache", inContainerd + "life, " + inSnapshotter + "TestSameBootstrap, cachefiles TestKernelSharedBlob, blobmgr TestDomains", ""},
		{"blobs annotation should be deprecated (label size limit)", inSnapshotter + "TestManyLayers, " + inCmd + "TestReboot", "images there have no such annotation: blobs are those of the bootstrap"},
		{"shared nydusd not stopped on INT/TERM", inCmd + "TestService", "it is kept, which is said in docs/operations.md"},
		{"use findmnt for mountpoint check", inSnapshotter + "TestRecover, " + inSnapshotter + "TestLostStore", "by mountinfo and statfs"},
		{"config given to nydusd looks strange (mixed fuse/fscache fields)", inCmd + "TestOrigin, " + inCmd + "TestTemplates, " + inCmd + "TestFscacheTemplate", ""},
		{"report nydus image usage", inContainerd + "life, " + inSnapshotter + "TestLazyUsage, " + inDaemon + "TestCacheUsageOnce", ""},
		{"support different nydus configurations at once", inCmd + "TestBackends", ""},
		{"enhance Mount struct of containerd", inCmd + "TestLogins", "no secrets in mounts; types of the mount manager are not used"},
		{"go-retryablehttp", "backend TestRetryWaits, backend TestBreaker, " + inCmd + "TestBadRegistry", ""},
		{"nydusd logs missing in fscache mode", inCmd + "TestService", "one stream with the snapshotter's"},
		{"temp file + rename atomicity", inSnapshotter + "FuzzRecord, " + inDaemon + "TestWriteFileAtOnce", ""},
		{"add end-to-end CI", inContainerd + "TestContainerd, kernel-tests/smoke TestSmoke", ""},
		{"CRI-like registry configuration (mirrors, scheme, TLS, retry, multi-auth)", inCmd + "TestLogins, backend/registry TestHostDir, " + inE2E + "hostsTOML", ""},
		{"hybrid mode (change daemon mode after first start)", inCmd + "TestNoDaemon, kernel-tests/power TestOneCache", "start and connect, and back; the transport is the kernel's"},
		{"TOML configuration file", inCmd + "TestBadConfig, " + inCmd + "TestShipped, " + inCmd + "FuzzConfig", ""},
		{"containerd.toml version 2 docs", inCmd + "TestContainerdSnippets", ""},
		{"log nydusd stderr/stdout (panics)", inCmd + "TestService", ""},
		{"SDK lacks error context", inCmd + "TestBadRegistry, internal/api TestErrorsCrossTheSocket", ""},
		{"download blob layers to cache dir (localfs preheat)", inSnapshotter + "TestPrefetch, " + inDaemon + "TestPrefetch", "by the system API and the image's own lists"},
		{"monitor nydusd", inCmd + "TestProcessWait, " + inCmd + "TestService, " + inCmd + "TestHungDaemon", "who waits for one that hangs is told"},
		{"make config-path optional", inCmd + "TestCheck, " + inCmd + "TestShipped", "every key has a default"},
		{`occasional "api.sock no such file" at first use`, inCmd + "TestDaemonAwaited, " + inCmd + "TestNoDaemon", ""},
	}
}

// flowDefects are those of 11.2, which are not to be copied.
func flowDefects() []flowItem {
	const notBuilt = "not built: such images are unpacked as ordinary ones (docs/design.md, section 8)"
	return []flowItem{
		{"shadowed commit error → empty success", inSnapshotter + "TestDiskFull", ""},
		{"retention regression with restart policy", inCmd + "TestService", ""},
		{"GC dead in fscache", inContainerd + "life, " + inDaemon + "TestRemove", ""},
		{"usage always ~0", inContainerd + "life, " + inSnapshotter + "TestLazyUsage", ""},
		{"unbind before umount", inSnapshotter + "TestLazyImage", ""},
		{"EBUSY treated as healthy", inSnapshotter + "TestRecover, " + inSnapshotter + "TestRecoverOthers", "a mount that the daemon does not know is replaced"},
		{"fsid from local counter", inSnapshotter + "TestLostStore", ""},
		{"default per-image domain", inSnapshotter + "TestSameBootstrap, " + inContainerd + "life", ""},
		{"zero-value config merge", inCmd + "TestNydusKeys, " + inCmd + "TestBadConfig", ""},
		{"pprof on metrics port", inCmd + "TestWebs, " + inCmd + "TestPprofAddress", ""},
		{"secrets in config files, mounts, labels, REST", inCmd + "TestLogins, " + inSnapshotter + "TestLoginsNowhere, " + inCmd + "TestSystem", ""},
		{"network calls and metrics queries inside Prepare", inCmd + "TestHungDaemon, " + inSnapshotter + "TestMountsAgain", "of a mounted image nobody is asked"},
		{"no backoff on daemon restart", "internal/keeper TestBackoff", ""},
		{"serial, all-or-nothing recovery before listening", inSnapshotter + "TestRecoverOthers, " + inSnapshotter + "TestRecover, " + inCmd + "TestReboot", ""},
		{"cross-namespace secret use", "internal/keychain TestSecrets, internal/keychain TestSecretsBounded", ""},
		{`cgroup "0 bytes"/abort bugs`, inCmd + "TestNydusKeys", "no cgroup is made; a limit is refused"},
		{"estargz calling the wrong binary", "", notBuilt},
		{"nodev,nosuid from the overlay helper", inSnapshotter + "TestSetuid", ""},
		{"Close deleting or closing state before draining RPCs", inCmd + "TestEndWhileWaiting", ""},
		{"index nil platform panic", "", notBuilt},
	}
}

// TestFlowCatalogue: what shows a case is there, and nothing is without it and without a reason.
func TestFlowCatalogue(t *testing.T) {
	known := flowNames{root: testenv.ModuleRoot(t), names: map[string]map[string]bool{}}
	for section, items := range map[string][]flowItem{"7.3": flowCases(), "8.1": flowRequirements(), "11.2": flowDefects()} {
		for _, i := range items {
			if i.here == "" && i.why == "" {
				t.Errorf("%s %s: nothing shows it, and nothing says why", section, i.name)
			}
			if i.here == "" {
				t.Logf("%s not here: %s: %s", section, i.name, i.why)
				continue
			}
			for place := range strings.SplitSeq(i.here, ", ") {
				folder, name, _ := strings.Cut(place, " ")
				if !known.in(t, folder)[name] {
					t.Errorf("%s %s: %s has no test %q", section, i.name, folder, name)
				}
			}
		}
	}
}

// flowNames are the functions and texts in the Go files of folders.
type flowNames struct {
	root  string
	names map[string]map[string]bool
}

// in returns those of a folder: functions of tests, methods of a world and texts, which names
// of cases are.
func (c flowNames) in(t *testing.T, folder string) map[string]bool {
	t.Helper()
	if names, ok := c.names[folder]; ok {
		return names
	}
	files, err := filepath.Glob(filepath.Join(c.root, folder, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no Go files in %s: %v", folder, err)
	}
	names := map[string]bool{}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(file) == "catalogue_flow_test.go" {
			continue // it has all names
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				names[n.Name.Name] = true
			case *ast.BasicLit:
				names[strings.Trim(n.Value, "`\"")] = true
			}
			return true
		})
	}
	c.names[folder] = names
	return names
}
