package smoke

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// testF1 reads the whole root of one of nydus's images: every path, attribute and byte.
// In a guest the kernel has nothing to complain about.
func testF1(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	s := m.snapshot(t, fixture(t, "zstd"), "7", "")
	before := len(complaints(t))
	p.bind(s)
	p.mount(s)
	s.image.compare(t, s.point)
	p.remove(s)
	if list := complaints(t); len(list) > before {
		t.Errorf("the kernel's log:\n%s", strings.Join(list[before:], "\n"))
	}
}

// complaints are the errors that a guest's kernel has logged about what we use. The host's
// log has those of other tests too.
func complaints(t *testing.T) (list []string) {
	t.Helper()
	if os.Getenv("EROFSD_GUEST") == "" {
		return nil
	}
	const readAll = 3 // SYSLOG_ACTION_READ_ALL
	p := make([]byte, 1<<20)
	n, err := unix.Klogctl(readAll, p)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(p[:n]), "\n") {
		level, text, ok := strings.Cut(line, ">")
		if !ok || len(level) != 2 || level[1] > '3' { // KERN_ERR
			continue
		}
		for _, word := range []string{"erofs", "CacheFiles", "netfs", "FS-Cache", "fscache"} {
			if strings.Contains(text, word) {
				list = append(list, text)
				break
			}
		}
	}
	return list
}

// testF4 has two images of one daemon read at once.
func testF4(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	var all sync.WaitGroup
	list := []*snapshot{
		m.snapshot(t, r.images.get(t, "one", "one"), "1", ""), m.snapshot(t, r.images.get(t, "two", "two"), "2", ""),
	}
	for _, s := range list {
		p.bind(s)
		p.mount(s)
	}
	for _, s := range list {
		for range 2 {
			all.Go(func() {
				if err := s.image.read(s.point); err != nil {
					t.Error(err)
				}
			})
		}
	}
	all.Wait()
	for _, s := range list {
		p.remove(s)
	}
}

// testF5 kills daemon and snapshotter with two images mounted, one of them read. The next
// ones mount them again, and what was fetched is there still.
func testF5(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.NoCompletion = true
	p := m.start(t, j)
	i := r.images.get(t, "one", "one")
	reg := newRegistry(t, i, "password")
	read, cold := m.snapshot(t, i, "1", ""), m.snapshot(t, r.images.get(t, "two", "two"), "2", "")
	reg.use(read, "password")
	for _, s := range []*snapshot{read, cold} {
		p.bind(s)
		p.mount(s)
	}
	read.image.compare(t, read.point)
	before, _ := reg.counts()
	p.signal(syscall.SIGKILL)
	p.checkHungUp()
	// nydus-snapshotter's policy restart: what was mounted and the socket go first.
	for _, s := range []*snapshot{read, cold} {
		if err := unix.Unmount(s.point, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	if err := os.Remove(j.Socket); err != nil {
		t.Error(err)
	}
	p = m.restart(t, j)
	p.wantState("RUNNING")
	for _, s := range []*snapshot{read, cold} {
		p.bind(s)
		p.mount(s)
		s.image.compare(t, s.point)
	}
	if after, _ := reg.counts(); after > before+1 { // the table of chunks may have to come again
		t.Errorf("%d requests to the registry for what had been read before the daemon was killed with %d", after-before, before)
	}
	for _, s := range []*snapshot{read, cold} {
		p.remove(s)
		p.cullBlobs(s.image)
	}
	m.awaitEmpty(t)
}

// restart starts a daemon after one that was killed: with fanotify its guard has the root
// for a moment.
func (m *machine) restart(t *testing.T, j job) (p *process) {
	t.Helper()
	await(t, "the dead daemon's guard to end", func() bool {
		p = m.launch(t, j)
		answers := false
		await(t, "the API to answer", func() bool {
			_, _, err := p.do("GET", "/api/v1/daemon", nil)
			answers = err == nil
			return answers || p.hasEnded()
		})
		if !answers && !strings.Contains(p.log(), "in use") {
			t.Fatalf("the daemon ended: %s\n%s", p.cmd.ProcessState, p.log())
		}
		return answers
	})
	p.connect()
	return p
}

// testF7 removes all images: nothing is left of them.
func testF7(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	var list []*snapshot
	for n, name := range []string{"one", "two"} {
		s := m.snapshot(t, r.images.get(t, name, name), string(rune('1'+n)), "")
		p.bind(s)
		p.mount(s)
		s.image.compare(t, s.point)
		list = append(list, s)
	}
	if len(m.left(t)) == 0 {
		t.Error("there is nothing in the cache although images were read")
	}
	for _, s := range list {
		p.remove(s)
	}
	for _, s := range list {
		p.cullBlobs(s.image)
	}
	m.awaitEmpty(t)
	p.stop()
}

// testF8 pulls and removes images, one and several, and pulls again while the removal is
// still under way.
func testF8(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	for _, count := range []int{1, 4, 4} {
		var list []*snapshot
		for n := range count {
			name := []string{"one", "two", "three", "four"}[n]
			s := m.snapshot(t, r.images.get(t, name, name), name, "")
			p.bind(s)
			p.mount(s)
			s.image.compare(t, s.point)
			list = append(list, s)
		}
		for _, s := range list { // what cannot go yet goes later, beside the next round
			p.remove(s)
			p.cullBlobs(s.image)
		}
	}
	m.awaitEmpty(t)
}

// testF9: an image's usage, of which the snapshotter makes that of a snapshot.
func testF9(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.NoCompletion = true
	p := m.start(t, j)
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	p.bind(s)
	p.mount(s)
	ask := api.ImageRequest{Image: s.fsid, DomainID: s.domain}
	cold, err := p.own.Usage(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	s.image.compare(t, s.point)
	warm, err := p.own.Usage(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	if len(warm.Blobs) != 1 || warm.Blobs[0].ID != s.image.blobs[0] || warm.Present != warm.Total || warm.Disk < warm.Total || warm.Disk <= cold.Disk {
		t.Errorf("before reading: %+v, after: %+v", cold, warm)
	}
	p.remove(s)
}

// testF10 starts with one thread, and where no cache can be.
func testF10(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.FillThreads = 1
	p := m.start(t, j)
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	p.bind(s)
	p.mount(s)
	s.image.compare(t, s.point)
	p.remove(s)
	p.stop()
	file := filepath.Join(m.dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, dir := range map[string]string{"a file": file, "nothing": filepath.Join(m.dir, "none", "none")} {
		j := m.job()
		if r.name == daemon.Cachefiles {
			j.Options.Fscache = dir
		} else if what == "a file" {
			j.Options.Root = dir
		} else {
			continue // a root is made
		}
		p := m.launch(t, j)
		p.awaitEnd()
		if code := p.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(p.log(), dir) {
			t.Errorf("with %s for a directory: %s, want code 1 and the name in\n%s", what, p.cmd.ProcessState, p.log())
		}
	}
}

// testF14 removes blobs from the cache of a daemon that has none yet, or no such blob.
func testF14(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.Nydusd.Upgrade = true
	p := m.start(t, j)
	p.wantState("INIT")
	id := strings.Repeat("a", 64)
	p.want(http.StatusServiceUnavailable, "DELETE", "/api/v2/blobs?blob_id="+id, nil, "DeleteBlobFile(DaemonAbnormal(NotReady))")
	p.stop()
	p = m.start(t, m.job())
	p.cull(http.StatusNoContent, id)
}

// testF17 refuses what is no image of a kind that can be served; nothing is left of it.
func testF17(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	good, err := os.ReadFile(r.images.get(t, "one", "one").boot)
	if err != nil {
		t.Fatal(err)
	}
	v5 := make([]byte, 8192)
	copy(v5, []byte{0x46, 0x41, 0x52, 0x52, 0, 5}) // "RAFS", in the order that nydus has it
	plain := append([]byte(nil), good...)
	for i := 1024 + 128; i < 1024+128+256; i++ { // RAFS's own superblock, behind EROFS's
		plain[i] = 0
	}
	for what, p5 := range map[string][]byte{"RAFS v5": v5, "EROFS without blobs' metadata": plain, "half a bootstrap": good[:len(good)/2], "nothing": {}} {
		s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
		if err := os.WriteFile(s.entry.Config.MetadataPath, p5, 0o600); err != nil {
			t.Fatal(err)
		}
		if status, answer, err := p.do("PUT", "/api/v2/blobs", s.entry); err != nil || status != http.StatusInternalServerError || !strings.Contains(answer, "CreateBlobObject(") {
			t.Errorf("%s: %d, %v: %s", what, status, err, answer)
		}
		if l := p.list(s.domain); len(l) != 0 {
			t.Errorf("%s: %v is bound", what, l)
		}
	}
	m.awaitEmpty(t)
}

// testUserUnmounts: what somebody else unmounts, or detaches while it is in use, is
// noticed, and the image can go.
func testUserUnmounts(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	p.bind(s)
	p.mount(s)
	f, err := os.Open(filepath.Join(s.point, "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := erofs.Unmount(s.point, true); err != nil {
		t.Fatal(err)
	}
	p.forget(s)
	got := make([]byte, len(s.image.files["big"]))
	if n, err := f.ReadAt(got, 0); err != nil || string(got) != s.image.files["big"] {
		t.Errorf("read of what is detached and not bound any more: %d bytes, %v", n, err)
	}
	f.Close()
	p.cull(http.StatusNoContent, s.fsid)
	p.cullBlobs(s.image)
	m.awaitEmpty(t)
}
