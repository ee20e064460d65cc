package smoke

import (
	"net/http"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/daemon"
)

// testSequence is what nydus-snapshotter with fs_driver = "fscache" does with two images
// of one domain, from the start of the daemon to its end (nydusd-surface 13.1). Nothing is
// left of them then.
func testSequence(t *testing.T, r row) {
	m := newMachine(t, r)
	sup := newSupervisor(t, m)
	j := m.job()
	handsOver := r.name == daemon.Cachefiles
	if handsOver {
		j = m.supervised(sup, "api")
	}
	send := func(p *process) {
		if handsOver {
			p.sendTo(sup)
		}
	}
	p := m.start(t, j)
	p.wantState("RUNNING")
	send(p)
	list := []*snapshot{
		m.snapshot(t, r.images.get(t, "one", "one"), "7", "pool"), m.snapshot(t, r.images.get(t, "two", "two"), "12", "pool"),
	}
	for _, s := range list {
		s.entry.Config.Prefetch.Enable = true
		p.bind(s)
		p.mount(s)
		send(p)
		p.wantState("RUNNING")
		// It asks by the snapshot's id, which is in no call, and takes any error for "in use".
		if status, answer, err := p.do("GET", "/api/v1/metrics/blobcache?id=/"+s.id, nil); err != nil || status != http.StatusNotFound && status != http.StatusOK {
			t.Errorf("the metrics of snapshot %s: %d, %v: %s", s.id, status, err, answer)
		} else if status == http.StatusOK && !strings.Contains(answer, s.image.blobs[0]) {
			t.Errorf("the metrics of snapshot %s lack its blob: %s", s.id, answer)
		}
		if c := p.cacheMetrics("/" + s.fsid); len(c.Files) != 1 || !strings.HasPrefix(c.Files[0], s.image.blobs[0]) {
			t.Errorf("the metrics of %s: %+v", s.fsid, c)
		}
	}
	if l := p.list("pool"); len(l) != 4 {
		t.Errorf("of two images in the domain are listed: %+v", l)
	}
	for _, s := range list {
		s.image.compare(t, s.point)
		s.image.compare(t, s.point) // and once more, of the page cache
	}
	for _, s := range list {
		p.remove(s)
		send(p)
		if answer := p.unbind(http.StatusInternalServerError, s.domain, s.fsid); !strings.Contains(answer, "blob_cache: cache entry not found") {
			t.Errorf("what is unbound twice: %s", answer)
		}
	}
	for _, s := range list {
		p.cullBlobs(s.image)
	}
	m.awaitEmpty(t)
	p.checkAlive()
	sup.drop()
	p.stop()
	p.checkHungUp()
	m.awaitEmpty(t)
}

// testNewPassword changes a registry's password while an image of it is mounted and half
// read; the snapshotter gives the new one by the same PUT as before.
func testNewPassword(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.NoCompletion = true
	p := m.start(t, j)
	i := r.images.get(t, "one", "one")
	reg := newRegistry(t, i, "old")
	s := m.snapshot(t, i, "7", "")
	reg.use(s, "old")
	p.bind(s)
	p.mount(s)
	if err := i.readFile(s.point, "dir/small"); err != nil {
		t.Fatal(err)
	}
	reg.change("new")
	reg.use(s, "new")
	p.bind(s)
	p.bind(s)
	i.compare(t, s.point)
	// The other order: a read fails meanwhile, and what it left must not stay.
	other := m.snapshot(t, i, "8", "other")
	reg.use(other, "new")
	p.bind(other)
	p.mount(other)
	reg.change("newest")
	_ = i.readFile(other.point, "big") // it may have been fetched already
	reg.use(other, "newest")
	p.bind(other)
	i.compare(t, other.point)
	p.remove(s)
	p.remove(other)
	for _, secret := range []string{"old", "new", "newest"} {
		if strings.Contains(p.log(), auth(secret)) || strings.Contains(p.log(), "user:"+secret) {
			t.Errorf("the log has the password %s", secret)
		}
	}
	p.cullBlobs(i)
	m.awaitEmpty(t)
}

// testDeleteMounted forgets an image that is mounted, as nydus-snapshotter does before
// every unmount: who reads it reads on, and it can be bound again.
func testDeleteMounted(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.NoCompletion = true
	p := m.start(t, j)
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	p.bind(s)
	p.mount(s)
	if err := s.image.readFile(s.point, "text"); err != nil {
		t.Fatal(err)
	}
	p.forget(s)
	if l := p.list(s.domain); len(l) != 0 {
		t.Errorf("listed after it was unbound: %+v", l)
	}
	if err := s.image.readFile(s.point, "dir/middle"); err != nil {
		t.Errorf("a file that nobody had read, after the image was unbound: %v", err)
	}
	p.bind(s)
	s.image.compare(t, s.point)
	p.forget(s)
	p.umount(s)
	p.cull(http.StatusNoContent, s.fsid)
	p.cullBlobs(s.image)
	m.awaitEmpty(t)
}

// testCullMounted: what is mounted is not removed, and says so; what was asked for while it
// was only in use still goes by itself.
func testCullMounted(t *testing.T, r row) {
	m := newMachine(t, r)
	p := m.start(t, m.job())
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	p.bind(s)
	p.mount(s)
	if err := s.image.readFile(s.point, "big"); err != nil {
		t.Fatal(err)
	}
	for _, id := range append([]string{s.fsid}, s.image.blobs...) {
		p.want(http.StatusInternalServerError, "DELETE", "/api/v2/blobs?blob_id="+id, nil, "failed to cull blob objects from fscache")
	}
	s.image.compare(t, s.point)
	p.forget(s)
	// Not bound any more, but mounted: the kernel has it until it is unmounted.
	for _, id := range append([]string{s.fsid}, s.image.blobs...) {
		if status, answer, err := p.do("DELETE", "/api/v2/blobs?blob_id="+id, nil); err != nil || status != http.StatusNoContent && status != http.StatusInternalServerError {
			t.Errorf("cull %s: %d, %v: %s", id, status, err, answer)
		}
	}
	s.image.compare(t, s.point)
	p.umount(s)
	for _, id := range append([]string{s.fsid}, s.image.blobs...) {
		p.cull(http.StatusNoContent, id)
	}
	m.awaitEmpty(t)
}

// testSharedBlob removes the first of two images with the same data while the second one
// runs, which is read by its own configuration then.
func testSharedBlob(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	j.Options.NoCompletion = true
	p := m.start(t, j)
	one, twin := r.images.get(t, "one", "one"), r.images.get(t, "twin", "one")
	if one.blobs[0] != twin.blobs[0] {
		t.Fatal("the images do not share their blob")
	}
	reg, other := newRegistry(t, one, "first"), newRegistry(t, one, "second")
	first, second := m.snapshot(t, one, "1", "pool"), m.snapshot(t, twin, "2", "pool")
	reg.use(first, "first")
	other.use(second, "second")
	for _, s := range []*snapshot{first, second} {
		p.bind(s)
		p.mount(s)
	}
	if err := one.readFile(first.point, "text"); err != nil {
		t.Fatal(err)
	}
	before, _ := reg.counts()
	if err := twin.readFile(second.point, "text"); err != nil {
		t.Fatal(err)
	}
	if after, _ := reg.counts(); after != before {
		t.Errorf("what the first image had fetched came again for the second: %d requests", after-before)
	}
	p.remove(first)
	if l := p.list("pool"); len(l) != 2 {
		t.Errorf("after the first image was removed are listed: %+v", l)
	}
	reg.change("gone") // the first image's registry does not know it any more
	twin.compare(t, second.point)
	p.want(http.StatusInternalServerError, "DELETE", "/api/v2/blobs?blob_id="+twin.blobs[0], nil, "failed to cull blob objects from fscache")
	p.remove(second)
	p.cullBlobs(twin)
	m.awaitEmpty(t)
}

// testRecords kills a daemon and starts it again: what was bound is bound again by the
// snapshotter, what was fetched is used, and what it had only remembered can be removed.
func testRecords(t *testing.T, r row) {
	m := newMachine(t, r)
	j := m.job()
	p := m.start(t, j)
	one := m.snapshot(t, r.images.get(t, "one", "one"), "1", "pool")
	two := m.snapshot(t, r.images.get(t, "two", "two"), "2", "pool")
	for _, s := range []*snapshot{one, two} {
		p.bind(s)
		p.mount(s)
		s.image.compare(t, s.point)
	}
	p.signal(syscall.SIGKILL)
	for _, s := range []*snapshot{one, two} {
		if err := unix.Unmount(s.point, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	p = m.restart(t, j) // at the dead one's socket, whose device nobody holds
	p.wantState("RUNNING")
	p.bind(one)
	p.mount(one)
	one.image.compare(t, one.point)
	// Nobody binds the second image again: it is collected.
	p.cull(http.StatusNoContent, two.fsid)
	p.cullBlobs(two.image)
	m.awaitGone(t, two.fsid)
	m.awaitGone(t, two.image.blobs[0])
	one.image.compare(t, one.point)
	p.remove(one)
	p.cullBlobs(one.image)
	m.awaitEmpty(t)
}
