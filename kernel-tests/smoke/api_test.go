package smoke

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/daemon"
)

// testDaemonStatus: whoever can connect finds it running; a second one at the same socket
// is refused and does not disturb it.
func testDaemonStatus(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	p.wantState("RUNNING")
	if st, err := os.Lstat(p.socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("its socket: %v, %v", st, err)
	}
	second := m.launch(t, m.job())
	second.awaitEnd()
	if code := second.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("a second daemon ended with %d\n%s", code, second.log())
	}
	p.wantState("RUNNING")
	p.checkAlive()
	p.stop()
	p.checkHungUp()
}

// testMetrics: an image's metrics by all of its names, with what was read.
func testMetrics(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "shared")
	s.entry.Config.ID = "the-config"
	p.want(http.StatusNotFound, "GET", "/api/v1/metrics/blobcache?id=/"+s.fsid, nil, "BlobcacheMetrics(Metrics(Stats(NoCounter)))")
	p.bind(s)
	file := s.image.blobs[0] + ".blob.data"
	for _, id := range []string{"the-config", "/the-config", s.fsid, "/" + s.fsid, s.domain + "/" + s.fsid} {
		if c := p.cacheMetrics(id); !slices.Equal(c.Files, []string{file}) || c.Complete {
			t.Errorf("%s, before it is mounted: %+v, want the file %s", id, c, file)
		}
	}
	p.mount(s)
	if err := s.image.readFile(s.point, "big"); err != nil {
		t.Fatal(err)
	}
	if c := p.cacheMetrics(""); !slices.Equal(c.Files, []string{file}) {
		t.Errorf("of all: %+v", c)
	}
	var b struct {
		Kind   string `json:"backend_type"`
		Reads  int    `json:"read_count"`
		Errors int    `json:"read_errors"`
		Bytes  int    `json:"read_amount_total"`
	}
	p.get("/api/v1/metrics/backend?id=/", &b)
	if b.Kind != "localfs" || b.Reads == 0 || b.Errors != 0 || b.Bytes < len(s.image.files["big"]) {
		t.Errorf("of the backend, after a file of %d bytes was read: %+v", len(s.image.files["big"]), b)
	}
	p.want(http.StatusNotFound, "GET", "/api/v1/metrics/pattern?id=unknown", nil, "Pattern(Metrics(Stats(NoCounter)))")
	p.want(http.StatusOK, "GET", "/metrics", nil, "erofsd_")
	p.remove(s)
	p.want(http.StatusNotFound, "GET", "/api/v1/metrics/blobcache?id="+s.fsid, nil, "NoCounter")
}

// testPrefetch: data come that nobody has read, because the configuration, or a mount of
// the daemon's own, says so.
func testPrefetch(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.NoCompletion = true // what comes unasked comes by prefetch
	p := m.start(t, j)
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	s.entry.Config.Prefetch.Enable = true
	p.bind(s)
	p.mount(s)
	for _, id := range []string{s.fsid, ""} {
		await(t, "the prefetch", func() bool {
			c := p.cacheMetrics(id)
			return c.Complete && c.Prefetch > 0
		})
	}
	p.remove(s)
	other := r.images.get(t, "two", "two")
	p.postMount(http.StatusNoContent, "POST", other, s.point, "/")
	t.Cleanup(func() { _ = unix.Unmount(s.point, unix.MNT_DETACH) })
	await(t, "the prefetch of a list", func() bool { return p.cacheMetrics("").Prefetch > 0 })
	p.want(http.StatusNoContent, "DELETE", "/api/v1/mount?mountpoint="+url.QueryEscape(s.point), nil)
}

// postMount has the daemon mount an image itself, by nydusd's API.
func (p *process) postMount(status int, method string, i *image, point string, files ...string) string {
	p.t.Helper()
	config, err := json.Marshal(map[string]any{
		"mode":   "direct",
		"device": map[string]any{"backend": map[string]any{"type": "localfs", "config": map[string]any{"dir": i.dir}}, "cache": map[string]any{"type": "blobcache"}},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return p.want(status, method, "/api/v1/mount?mountpoint="+url.QueryEscape(point), map[string]any{
		"source": i.boot, "fs_type": "rafs", "config": string(config), "prefetch_files": files,
	})
}

// testSubMountCache mounts and unmounts again and again.
func testSubMountCache(t *testing.T, r row) {
	const rounds = 300
	m := newMachine(t, r)
	p := m.start(t, m.job())
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	round := func() {
		p.bind(s)
		p.mount(s)
		if err := s.image.readFile(s.point, "dir/small"); err != nil {
			t.Fatal(err)
		}
		p.umount(s)
		p.forget(s)
	}
	for range 10 {
		round()
	}
	before := p.settled(use{})
	for range rounds - 10 {
		round()
	}
	after := p.settled(before)
	t.Logf("before: %v; after %d rounds: %v", before, rounds, after)
	if l := p.list(s.domain); len(l) != 0 {
		t.Errorf("still bound: %+v", l)
	}
}

// testNestedMountpoint: an image mounted in a directory of another one can be looked at
// at once when it comes again.
func testNestedMountpoint(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	outer := m.snapshot(t, r.images.get(t, "one", "one"), "1", "shared")
	inner := m.snapshot(t, r.images.get(t, "two", "two"), "2", "shared")
	inner.point = filepath.Join(outer.point, "nested")
	p.bind(outer)
	p.bind(inner)
	p.mount(outer)
	if r.name == daemon.Fanotify { // it would have to look into what it serves
		if err := p.tryMount(inner); err == nil || !strings.Contains(err.Error(), "lies inside the image") {
			t.Errorf("mounted inside of an image that the daemon serves: %v", err)
		}
		inner.point = filepath.Join(m.dir, "snapshots", inner.id, "mnt")
	}
	for range 5 {
		p.mount(inner)
		st, err := os.Stat(filepath.Join(inner.point, "big"))
		if err != nil || st.Size() != int64(len(inner.image.files["big"])) {
			t.Fatalf("stat after the mount: %v, %v", st, err)
		}
		p.umount(inner)
		if entries, err := os.ReadDir(inner.point); err != nil || len(entries) != 0 {
			t.Fatalf("after the unmount: %v, %v", entries, err)
		}
	}
	p.remove(outer)
}

// testMount has the daemon mount by nydusd's API, with another configuration and another
// image in between.
func testMount(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	point := filepath.Join(m.dir, "mnt")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(point, unix.MNT_DETACH) })
	one, two := r.images.get(t, "one", "one"), r.images.get(t, "two", "two")
	p.postMount(http.StatusInternalServerError, "PUT", one, point)
	p.postMount(http.StatusNoContent, "POST", one, point)
	one.compare(t, point)
	p.postMount(http.StatusInternalServerError, "POST", two, point)
	p.postMount(http.StatusNoContent, "PUT", one, point)
	one.compare(t, point)
	p.postMount(http.StatusNoContent, "PUT", two, point)
	two.compare(t, point)
	target := "/api/v1/mount?mountpoint=" + url.QueryEscape(point)
	p.want(http.StatusNoContent, "DELETE", target, nil)
	p.want(http.StatusInternalServerError, "DELETE", target, nil)
	if entries, err := os.ReadDir(point); err != nil || len(entries) != 0 {
		t.Errorf("after the unmount: %v, %v", entries, err)
	}
}

// testHotReloadConfig: credentials are changed twice and read back, and the second ones
// are right.
func testHotReloadConfig(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	i := r.images.get(t, "one", "one")
	reg := newRegistry(t, i, "third")
	s := m.snapshot(t, i, "7", "")
	reg.use(s, "first")
	p.want(http.StatusOK, "GET", "/api/v1/config", nil, "{}")
	p.bind(s)
	target := "/api/v1/config?id=/" + s.fsid
	for _, password := range []string{"second", "third"} {
		p.want(http.StatusNoContent, "PUT", target, map[string]string{"registry_auth": auth(password)})
		var got map[string]string
		p.get(target, &got)
		if got["registry_auth"] != auth(password) {
			t.Errorf("read back %v, want %s", got, auth(password))
		}
	}
	p.mount(s)
	i.compare(t, s.point)
	if served, refused := reg.counts(); served == 0 || refused > 2 { // a client may ask without credentials first
		t.Errorf("the registry served %d requests and refused %d", served, refused)
	}
	reg.change("fourth")
	p.want(http.StatusNoContent, "PUT", target, map[string]string{"registry_auth": auth("fourth")})
	p.remove(s)
	for _, secret := range []string{"first", "second", "third", "fourth"} {
		for _, text := range []string{auth(secret), "user:" + secret} {
			if strings.Contains(p.log(), text) {
				t.Errorf("the log has the password %s", secret)
			}
		}
	}
}

// settled waits until the daemon takes no more than before, with some room for what is
// allocated at will, and returns what it takes. An empty before accepts everything.
func (p *process) settled(before use) (u use) {
	p.t.Helper()
	const room = 8 << 20
	ok := func() bool {
		u = p.use()
		return before == (use{}) || u.goroutines <= before.goroutines && u.files <= before.files &&
			u.heap <= before.heap+room/4 && (raced || u.rss <= before.rss+room)
	}
	defer func() {
		if p.t.Failed() {
			p.t.Logf("it takes %v, before %v", u, before)
		}
	}()
	await(p.t, fmt.Sprintf("the daemon to take as little as before (%v)", before), ok)
	return u
}
