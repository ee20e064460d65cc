package smoke

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// An entry is the body of PUT /api/v2/blobs as nydus-snapshotter re-marshals it from its
// template (config/daemonconfig, nydus-snapshotter v0.15).
type entry struct {
	Type     string `json:"type"`
	ID       string `json:"id"`
	DomainID string `json:"domain_id"`
	Config   struct {
		ID            string          `json:"id"`
		BackendType   string          `json:"backend_type"`
		BackendConfig json.RawMessage `json:"backend_config"`
		CacheType     string          `json:"cache_type"`
		CacheConfig   struct {
			WorkDir string `json:"work_dir"`
		} `json:"cache_config"`
		Prefetch     prefetch `json:"prefetch_config"`
		MetadataPath string   `json:"metadata_path"`
	} `json:"config"`
}

type prefetch struct {
	Enable  bool `json:"enable"`
	All     bool `json:"prefetch_all"`
	Threads int  `json:"threads_count"`
	Merging int  `json:"merging_size"`
	Rate    int  `json:"bandwidth_rate"`
}

// A snapshot is what nydus-snapshotter has of an image: a directory with the bootstrap, a
// place to mount it, and names.
type snapshot struct {
	image        *image
	id           string // containerd's
	fsid, domain string
	point        string
	entry        entry
}

// snapshot prepares one. Without a domain the image has one for itself.
func (m *machine) snapshot(t testing.TB, i *image, id, domain string) *snapshot {
	t.Helper()
	sum := sha256.Sum256([]byte("nydus-snapshot-" + id))
	s := &snapshot{image: i, id: id, fsid: hex.EncodeToString(sum[:]), domain: domain}
	if domain == "" {
		s.domain = s.fsid
	}
	dir := filepath.Join(m.dir, "snapshots", id)
	work := filepath.Join(dir, "fs")
	s.point = filepath.Join(dir, "mnt")
	boot := filepath.Join(work, "image", "image.boot")
	p, err := os.ReadFile(i.boot)
	err = errors.Join(err, os.MkdirAll(filepath.Dir(boot), 0o755), os.MkdirAll(s.point, 0o755))
	if err := errors.Join(err, os.WriteFile(boot, p, 0o644)); err != nil {
		t.Fatal(err)
	}
	e := &s.entry
	e.Type, e.ID, e.DomainID = "bootstrap", s.fsid, s.domain
	e.Config.ID, e.Config.CacheType, e.Config.MetadataPath = s.fsid, "fscache", boot
	e.Config.CacheConfig.WorkDir = work
	e.Config.Prefetch = prefetch{All: true, Threads: 8, Merging: 1 << 20}
	e.Config.BackendType, e.Config.BackendConfig = i.localfs()
	return s
}

// bind is PUT /api/v2/blobs.
func (p *process) bind(s *snapshot) {
	p.t.Helper()
	p.want(http.StatusNoContent, "PUT", "/api/v2/blobs", s.entry)
}

// mount mounts a bound image: with cachefiles as nydus-snapshotter does, by mount(2) from
// here, else by the daemon. The mount ends with the test.
func (p *process) mount(s *snapshot) {
	p.t.Helper()
	if err := p.tryMount(s); err != nil {
		p.t.Fatalf("mount %s: %v\n%s", s.id, err, p.log())
	}
	p.t.Cleanup(func() { _ = unix.Unmount(s.point, unix.MNT_DETACH) }) // usually nothing is there
}

func (p *process) tryMount(s *snapshot) error {
	if p.row.name == daemon.Cachefiles {
		return unix.Mount("none", s.point, "erofs", 0, s.mountData())
	}
	_, err := p.own.Mount(p.t.Context(), api.MountRequest{Image: s.fsid, DomainID: s.domain, Mountpoint: s.point})
	return err
}

func (s *snapshot) mountData() string {
	if s.domain == s.fsid {
		return "fsid=" + s.fsid
	}
	return "domain_id=" + s.domain + ",fsid=" + s.fsid
}

// umount is the opposite of mount.
func (p *process) umount(s *snapshot) {
	p.t.Helper()
	if err := p.tryUmount(s); err != nil {
		p.t.Fatalf("unmount %s: %v\n%s", s.id, err, p.log())
	}
}

func (p *process) tryUmount(s *snapshot) error {
	if p.row.name == daemon.Cachefiles {
		return unix.Unmount(s.point, 0)
	}
	return p.own.Unmount(p.t.Context(), api.UnmountRequest{Mountpoint: s.point})
}

// remove does what nydus-snapshotter does with an image that nobody uses any more, in its
// order: forget, unmount, remove the bootstrap from the cache.
func (p *process) remove(s *snapshot) {
	p.t.Helper()
	p.forget(s)
	p.umount(s)
	p.cull(http.StatusNoContent, s.fsid)
}

// forget is DELETE /api/v2/blobs with a domain: the id is left out where it is the same.
func (p *process) forget(s *snapshot) {
	p.t.Helper()
	if s.domain == s.fsid {
		p.unbind(http.StatusNoContent, s.domain, "")
		return
	}
	p.unbind(http.StatusNoContent, s.domain, s.fsid)
}

// cullBlobs is what the collection of unused blobs does.
func (p *process) cullBlobs(i *image) {
	p.t.Helper()
	for _, id := range i.blobs {
		p.cull(http.StatusNoContent, id)
	}
}

// left lists what the caches and the daemon's directories have, relative to them.
func (m *machine) left(t testing.TB) (names []string) {
	t.Helper()
	for _, dir := range []string{m.fscache, filepath.Join(m.root, "images"), filepath.Join(m.root, "cache")} {
		err := filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
			if os.IsNotExist(err) {
				return nil // it goes at this moment
			}
			name, rerr := filepath.Rel(m.dir, path)
			if err == nil && rerr == nil && path != dir && !m.lasting(name) {
				names = append(names, name)
			}
			return errors.Join(err, rerr)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// lasting reports whether something is there as long as a cache is: the kernel's own
// directories, and what says that the daemon uses its own.
func (m *machine) lasting(name string) bool {
	return name == "cache/cache" || name == "cache/graveyard" || name == "root/cache/,running"
}

// awaitEmpty waits until nothing is left of any image.
func (m *machine) awaitEmpty(t testing.TB) {
	t.Helper()
	m.awaitGone(t, "")
}

// awaitGone waits until no name with a part like that is left.
func (m *machine) awaitGone(t testing.TB, part string) {
	t.Helper()
	var left []string
	defer func() {
		if t.Failed() {
			t.Logf("left: %q", left)
		}
	}()
	await(t, "the cache to be clean of "+part, func() bool {
		left = nil
		for _, name := range m.left(t) {
			if strings.Contains(name, part) {
				left = append(left, name)
			}
		}
		return len(left) == 0
	})
}
