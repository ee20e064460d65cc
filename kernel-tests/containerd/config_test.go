package containerd

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/configs"
)

// configure writes the configurations of a node: those of configs/containerd, with other paths
// and what a node of tests has besides.
func (n *node) configure(t *testing.T, o nodeOptions) {
	t.Helper()
	snippet, own, pods := "config-v2.toml", oneConfig, onePods
	if n.w.runtime.Two() {
		snippet, own, pods = "config-v3.toml", twoConfig, twoPods
	}
	if o.handler != "" {
		snippet = "runtime-v3.toml"
		pods += handlerPods
	}
	text, err := configs.File("containerd/" + snippet)
	if err != nil {
		t.Fatal(err)
	}
	stanza := strings.NewReplacer(
		"/run/containerd-erofsd/containerd-erofsd-grpc.sock", "DIR/s.sock",
		"/var/lib/containerd/io.containerd.snapshotter.v1.erofsd", "DIR/snapshots").Replace(string(text))
	if !strings.Contains(stanza, "DIR/s.sock") {
		t.Fatalf("%s does not say where the snapshotter is", snippet)
	}
	if o.transfer {
		const local = "disable_snapshot_annotations = false\n" // has the CRI pull by itself
		if !strings.Contains(stanza, local) {
			t.Fatalf("%s does not say %s", snippet, local)
		}
		stanza = strings.Replace(stanza, local, "", 1)
	}
	disabled := `"io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile", "io.containerd.nri.v1.nri"`
	if o.pods {
		own += pods
	} else {
		disabled += `, "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"`
	}
	files := map[string]string{"snapshotter.toml": snapshotterConfig, "containerd.toml": own}
	if o.pods {
		files["snapshotter.toml"] += credentialsConfig
	}
	if n.w.runtime.Two() {
		files["erofsd.toml"] = stanza // which the other imports
	} else {
		files["containerd.toml"] += strings.Replace(stanza, "version = 2\n", "", 1)
	}
	replace := strings.NewReplacer("DIR", n.dir, "REGISTRY", n.w.addr, "PRIVATE", n.w.private, "PAUSE", n.w.pause, "DISABLED", disabled, "MODE", cmp.Or(n.w.mode, "start"))
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(n.dir, name), []byte(replace.Replace(text)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// What nodes have besides: their own directories, and nothing of the machine's.
const (
	oneConfig = `
version = 2
root = "DIR/c-root"
state = "DIR/c-state"
disabled_plugins = [DISABLED]
[grpc]
address = "DIR/c.sock"
`
	twoConfig = `
version = 3
root = "DIR/c-root"
state = "DIR/c-state"
imports = ["DIR/erofsd.toml"]
disabled_plugins = [DISABLED]
[grpc]
address = "DIR/c.sock"
`
)

// The CRI's: pods get sandboxes from our image, and statistics are collected often.
const (
	onePods = `
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "PAUSE"
stats_collect_period = 1
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "DIR/runc"
`
	twoPods = `
[plugins."io.containerd.cri.v1.images"]
stats_collect_period = 1
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "PAUSE"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
Root = "DIR/runc"
`
)

// handlerPods is what the runtime of runtime-v3.toml has besides.
const handlerPods = `
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.erofsd.options]
Root = "DIR/runc"
`

const snapshotterConfig = `
root = "DIR/snapshots"
address = "DIR/s.sock"
[log]
level = "debug"
[system]
address = "DIR/y.sock"
[daemon]
mode = "MODE"
socket = "DIR/e.sock"
root = "DIR/cache"
args = ["--rlimit-nofile", "0", "--no-completion"]
[containerd]
address = "DIR/c.sock"
[backend]
plain_http = ["REGISTRY", "PRIVATE"]
`

const credentialsConfig = `
[credentials]
providers = ["cri"]
[credentials.cri]
address = "DIR/c.sock"
`
