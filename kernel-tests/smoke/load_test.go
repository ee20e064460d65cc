package smoke

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"
)

// bindAll binds n names for an image at once.
func (p *process) bindAll(m *machine, i *image, domain string, n int) {
	p.t.Helper()
	p.each(n, func(k int) error {
		return p.act("PUT", "/api/v2/blobs", p.named(m, i, domain, k), http.StatusNoContent)
	})
}

func (p *process) unbindAll(domain string, n int) {
	p.t.Helper()
	p.each(n, func(k int) error {
		return p.act("DELETE", "/api/v2/blobs?domain_id="+domain+"&blob_id="+numbered(k), nil, http.StatusNoContent)
	})
}

func numbered(k int) string { return fmt.Sprintf("image-%03d", k) }

// named is an entry for an image.
func (p *process) named(m *machine, i *image, domain string, k int) entry {
	var e entry
	e.Type, e.ID, e.DomainID = "bootstrap", numbered(k), domain
	e.Config.ID, e.Config.CacheType, e.Config.MetadataPath = e.ID, "fscache", i.boot
	e.Config.CacheConfig.WorkDir = m.dir
	e.Config.BackendType, e.Config.BackendConfig = i.localfs()
	return e
}

// each calls do for all numbers below n, all at once.
func (p *process) each(n int, do func(k int) error) {
	p.t.Helper()
	var all sync.WaitGroup
	errs := make([]error, n)
	for k := range n {
		all.Go(func() { errs[k] = do(k) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		p.t.Error(err)
	}
}

// act is want for any goroutine.
func (c *client) act(method, target string, body any, wanted ...int) error {
	status, answer, err := c.do(method, target, body)
	if err != nil {
		return err
	}
	for _, w := range wanted {
		if status == w {
			return nil
		}
	}
	return fmt.Errorf("%s %s: status %d, want %d: %s", method, target, status, wanted, answer)
}

// testConcurrentPuts binds 200 images at once, half of them each twice.
func testConcurrentPuts(t *testing.T, r row) {
	const images = 100
	m := newMachine(t, r)
	p := m.start(t, m.job())
	i := r.images.get(t, "one", "one")
	p.each(2*images, func(k int) error {
		return p.act("PUT", "/api/v2/blobs", p.named(m, i, "pool", k%images), http.StatusNoContent)
	})
	if l := p.list("pool"); len(l) != images+1 { // and the blob
		t.Errorf("%d are listed, want %d", len(l), images+1)
	}
	p.wantState("RUNNING")
	p.unbind(http.StatusNoContent, "pool", "")
	if l := p.list("pool"); len(l) != 0 {
		t.Errorf("%d are listed, want none", len(l))
	}
	for k := range images {
		p.cull(http.StatusNoContent, numbered(k))
	}
	p.cullBlobs(i)
	m.awaitEmpty(t)
}

// testBindDuringUnbind binds, mounts, unbinds and asks at once, all for one name: every
// answer is one of those that make sense, and what is mounted is right.
func testBindDuringUnbind(t *testing.T, r row) {
	const rounds, workers = 12, 4
	m := newMachine(t, r)
	p := m.start(t, m.job())
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	twin := m.snapshot(t, r.images.get(t, "two", "two"), "7-again", "")
	twin.fsid, twin.domain, twin.entry.ID, twin.entry.DomainID = s.fsid, s.domain, s.entry.ID, s.entry.DomainID
	unbind := "/api/v2/blobs?domain_id=" + s.domain + "&blob_id=" + s.fsid
	p.each(workers*4, func(k int) error {
		for range rounds {
			var err error
			switch k % 4 {
			case 0:
				err = p.act("PUT", "/api/v2/blobs", s.entry, 204, 500) // the twin may have the name
			case 1:
				err = p.act("PUT", "/api/v2/blobs", twin.entry, 204, 500)
			case 2:
				err = p.act("DELETE", unbind, nil, 204, 500)
			case 3:
				err = p.act("GET", "/api/v2/blobs?domain_id="+s.domain, nil, 200)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	p.unbind(http.StatusNoContent, s.domain, "")
	for _, other := range []*snapshot{s, twin, s} { // of a name that had both
		p.bind(other)
		p.mount(other)
		other.image.compare(t, other.point)
		p.remove(other)
	}
	p.cullBlobs(s.image)
	p.cullBlobs(twin.image)
	m.awaitEmpty(t)
}

// testMountDuringUnbind mounts while the same image is unbound and bound: the mount works,
// and then everything in it is right, or it does not.
func testMountDuringUnbind(t *testing.T, r row) {
	rounds, step := 15, time.Millisecond
	if emulated() {
		rounds, step = 8, 15*time.Millisecond
	}
	m := newMachine(t, r)
	p := m.start(t, m.job())
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	mounted := 0
	for n := range rounds {
		p.bind(s)
		unbound := make(chan error, 1)
		go func() {
			time.Sleep(time.Duration(n) * step) // each time the mount is further
			unbound <- p.act("DELETE", "/api/v2/blobs?domain_id="+s.domain, nil, http.StatusNoContent)
		}()
		err := p.tryMount(s)
		if uerr := <-unbound; uerr != nil {
			t.Error(uerr)
		}
		if err != nil {
			continue
		}
		mounted++
		if err := s.image.readFile(s.point, "dir/middle"); err != nil {
			t.Errorf("mounted, and then: %v", err)
		}
		p.umount(s)
	}
	t.Logf("mounted %d of %d times", mounted, rounds)
	p.bind(s)
	p.mount(s)
	s.image.compare(t, s.point)
	p.remove(s)
	p.cullBlobs(s.image)
	m.awaitEmpty(t)
}

// emulated reports whether this is a guest, where everything takes thirty times as long;
// how often something is repeated is what can be saved.
func emulated() bool { return os.Getenv("EROFSD_GUEST") != "" }

// testManyBound binds 200 images, and binds and unbinds 1000 times: the daemon takes then
// what it took before.
func testManyBound(t *testing.T, r row) {
	images, rounds := 200, 1000
	if emulated() {
		images, rounds = 60, 200
	}
	m := newMachine(t, r)
	p := m.start(t, m.job())
	i := r.images.get(t, "one", "one")
	p.bindAll(m, i, "warm", 20) // what is made once
	p.unbindAll("warm", 20)
	before := p.settled(use{})
	p.bindAll(m, i, "pool", images)
	full := p.use()
	if full.files < before.files+images/2 || full.files > before.files+4*images {
		t.Logf("%d images take %d descriptors", images, full.files-before.files)
	}
	if c := p.cacheMetrics(""); len(c.Files) != 1 {
		t.Errorf("the metrics of all: %+v, want the one file", c)
	}
	p.unbindAll("pool", images)
	for range rounds / 20 {
		p.bindAll(m, i, "rounds", 20)
		p.unbindAll("rounds", 20)
	}
	after := p.settled(before)
	t.Logf("before: %v; with %d images: %v; after %d rounds: %v", before, images, full, rounds, after)
	p.checkAlive()
}

// testFileLimit serves more images than a daemon with 1024 descriptors can have open at
// will: it says what it lacks, or serves; what is mounted is right, and it recovers.
func testFileLimit(t *testing.T, r row) {
	images, open := 150, 8
	if emulated() {
		images, open = 50, 4
	}
	m := newMachine(t, r)
	j := m.job()
	j.Files = 1024
	p := m.start(t, j)
	i := r.images.get(t, "one", "one")
	p.bindAll(m, i, "pool", images)
	var list []*snapshot
	for n := range open {
		s := m.snapshot(t, r.images.get(t, []string{"one", "two"}[n%2], []string{"one", "two"}[n%2]), fmt.Sprint(n), "")
		p.bind(s)
		p.mount(s)
		list = append(list, s)
	}
	for _, s := range list {
		s.image.compare(t, s.point)
		p.remove(s)
	}
	p.unbindAll("pool", images)
	// The daemon sees a moment later that the connections of all these calls are closed.
	await(t, "all but 100 descriptors to be closed", func() bool { return p.use().files <= 100 })
}
