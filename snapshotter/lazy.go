package snapshotter

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
)

// A lazyLayer is a committed snapshot with a bootstrap.
type lazyLayer struct {
	id        string // of the snapshot
	chainID   string // of the layer; "": not known
	reference string // that a label names; "": none does
}

// images is what is known of lazy layers while the process lives.
type images struct {
	mu      sync.Mutex              // guards what follows
	mounted map[string]bool         // by snapshot: mounted since the daemon was started last
	turns   map[string]*countedTurn // by record.key
	told    map[string]told         // by snapshot: what the daemon was told

	failures map[string]string // by snapshot: why its image was not mounted
}

// A countedTurn is in the table as long as somebody wants it.
type countedTurn struct {
	turn
	wanted int // guarded by images.mu
}

func newImages() *images {
	return &images{
		mounted: map[string]bool{}, turns: map[string]*countedTurn{}, told: map[string]told{}, failures: map[string]string{},
	}
}

// take waits until nobody else changes the image called key; give lets the next one do so.
func (m *images) take(ctx context.Context, key string) (give func(), err error) {
	m.mu.Lock()
	t := m.turns[key]
	if t == nil {
		t = &countedTurn{turn: make(turn, 1)}
		m.turns[key] = t
	}
	t.wanted++
	m.mu.Unlock()
	leave := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if t.wanted--; t.wanted == 0 {
			delete(m.turns, key)
		}
	}
	if err := t.turn.take(ctx); err != nil {
		leave()
		return nil, err
	}
	return func() { t.give(); leave() }, nil
}

func (m *images) isMounted(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mounted[id]
}

func (m *images) setMounted(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mounted[id] = true
}

// drop forgets a snapshot.
func (m *images) drop(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mounted, id)
	delete(m.told, id)
	delete(m.failures, id)
}

// forget has every image looked at again before it is used.
func (m *images) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.mounted)
}

// What statfs(2) calls EROFS, and FUSE, by which a nydusd may serve.
const (
	erofsMagic = 0xe0f5e1e2
	fuseMagic  = 0x65735546
)

// isImage reports whether dir is in a file system of an image, dead or alive. It reads nothing
// of it.
func isImage(dir string) bool {
	var st syscall.Statfs_t
	err := syscall.Statfs(dir, &st)
	return err == nil && (uint32(st.Type) == erofsMagic || st.Type == fuseMagic) || errors.Is(err, syscall.ENOTCONN)
}

// mountedAt reports whether something is mounted at point, and be it a FUSE that nobody
// answers for.
func mountedAt(point string) (bool, error) {
	mounted, err := mountinfo.Mounted(point)
	if errors.Is(err, syscall.ENOTCONN) {
		return true, nil
	}
	return mounted, err
}

// point is where the image of a lazy layer is mounted.
func (s *Snapshotter) point(id string) string { return s.path(snapshotsDir, id, "mnt") }

// mountImage has the image of l mounted and returns the place. Of those who want the same
// image at the same time one has it done and the others wait for that.
func (s *Snapshotter) mountImage(ctx context.Context, l lazyLayer) (string, error) {
	point := s.point(l.id)
	if s.images.isMounted(l.id) && isImage(point) {
		return point, nil
	}
	err := s.mountInTime(ctx, l)
	if err == nil || !s.images.isMounted(l.id) { // who left while another one had it mounted tells nothing of it
		s.images.setFailure(l.id, err)
	}
	if err != nil {
		return "", err
	}
	return point, nil
}

// mountTime is how long a caller who would wait for ever waits for an image: longer than the
// daemon needs to find out that a registry does not answer.
const mountTime = 5 * time.Minute

// mountInTime is mountFirst, and ends when the daemon does not.
func (s *Snapshotter) mountInTime(ctx context.Context, l lazyLayer) error {
	late := fmt.Errorf("mount the image of snapshot %s: erofsd has not done so for %v; it hangs if erofsctl status does not answer: restart it then: %w", l.id, s.mountTime, errdefs.ErrUnavailable)
	ctx, cancel := context.WithTimeoutCause(ctx, s.mountTime, late)
	defer cancel()
	err := s.mountFirst(ctx, l)
	if err != nil && errors.Is(context.Cause(ctx), late) {
		return late
	}
	return err
}

// mountFirst is mountImage for an image that is not known to be mounted.
func (s *Snapshotter) mountFirst(ctx context.Context, l lazyLayer) error {
	r, err := s.recordOf(ctx, l)
	if err != nil {
		return fmt.Errorf("mount the image of snapshot %s: %w", l.id, err)
	}
	give, err := s.images.take(ctx, r.key())
	if err != nil {
		return err
	}
	defer give()
	if s.images.isMounted(l.id) && isImage(s.point(l.id)) {
		return nil
	}
	if err := s.bindAndMount(ctx, l, r); err != nil {
		return fmt.Errorf("mount image %s: %w", r.name(), err)
	}
	s.images.setMounted(l.id)
	s.shares.mounted(r)
	s.grant(ctx, r)
	s.log.Info("image is mounted and served lazily", "image", r.name(), "snapshot", l.id)
	return nil
}

// recordOf returns what the daemon knows, or is going to know, the image of l as. A bootstrap
// that is not what it was is an error: its digest is its name.
func (s *Snapshotter) recordOf(ctx context.Context, l lazyLayer) (record, error) {
	r, err := readRecord(s.path(snapshotsDir, l.id))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	digest, derr := s.bootstrapDigest(l.id)
	switch {
	case derr != nil:
		return r, derr
	case err != nil:
		r.Image, r.Domain = digest, s.domain(ctx, digest)
	case r.Image != digest:
		return r, fmt.Errorf("the bootstrap in %s is not what was pulled any more; remove the image and pull it again: %w",
			s.upper(l.id), errdefs.ErrFailedPrecondition)
	}
	if l.reference != "" {
		r.Reference = l.reference
	}
	if r.Reference == "" && s.find != nil && l.chainID != "" {
		if r.Reference, err = s.find(ctx, l.chainID); err != nil {
			s.log.Warn("ask containerd by which reference an image was pulled", "image", r.Image, "err", err)
		}
	}
	return r, nil
}

// bindAndMount tells the daemon of the image and has it mounted, unless it is. The caller
// has the image's turn.
func (s *Snapshotter) bindAndMount(ctx context.Context, l lazyLayer, r record) error {
	origin, err := s.source(ctx, r.Reference)
	if err != nil {
		return err
	}
	if old, err := readRecord(s.path(snapshotsDir, l.id)); err != nil || old != r {
		s.shares.put(l.id, r) // before who removes the directory can forget it
		if err := r.write(s.path(snapshotsDir, l.id)); err != nil {
			s.shares.drop(l.id)
			return err
		}
	}
	return again(ctx, func() error { return s.haveMounted(ctx, l, r, origin) })
}

// haveMounted is bindAndMount of an image whose record is written. Each of its steps may have
// been done before.
func (s *Snapshotter) haveMounted(ctx context.Context, l lazyLayer, r record, origin Origin) error {
	if err := s.bind(ctx, l, r, origin); err != nil {
		return err
	}
	point := s.point(l.id)
	there, err := s.served(ctx, r, point)
	if err != nil || there {
		return err
	}
	if err := detachStale(point); err != nil {
		return err
	}
	if err := os.Mkdir(point, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	failpoint.Hit("snapshotter.mount")
	_, err = s.mounter.Mount(ctx, api.MountRequest{Mountpoint: point, Image: r.Image, DomainID: r.Domain})
	failpoint.Hit("snapshotter.mounted")
	return classified(err)
}

// bind tells the daemon of the image. If a login may be missing, the daemon is not told
// again of an image that it serves: it would forget the login it has.
func (s *Snapshotter) bind(ctx context.Context, l lazyLayer, r record, origin Origin) error {
	t := told{layer: l, record: r, until: origin.Until}
	if origin.Unsure {
		if known, err := s.knows(ctx, r); err != nil || known {
			s.images.setTold(t)
			return err
		}
	}
	f, err := s.bootstrap(l.id)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil { // its name is what is wanted
		return err
	}
	bound := api.BindRequest{ID: r.Image, DomainID: r.Domain, Bootstrap: f.Name(), Config: origin.Config}
	failpoint.Hit("snapshotter.bind")
	if err := s.mounter.BindImage(ctx, bound); err != nil {
		return classified(err)
	}
	failpoint.Hit("snapshotter.bound")
	t.config = sha256.Sum256(origin.Config)
	s.images.setTold(t)
	return nil
}

// knows reports whether the daemon has the image mounted anywhere.
func (s *Snapshotter) knows(ctx context.Context, r record) (bool, error) {
	st, err := s.mounter.Status(ctx)
	return slices.ContainsFunc(st.Images, func(m api.Mount) bool {
		return m.ID == r.Image && m.DomainID == r.Domain && !m.Detached
	}), classified(err)
}

// served reports whether the daemon has the image mounted at point.
func (s *Snapshotter) served(ctx context.Context, r record, point string) (bool, error) {
	st, err := s.mounter.Status(ctx)
	if err != nil {
		return false, classified(err)
	}
	for _, m := range st.Images {
		if m.Mountpoint == point && !m.Detached {
			return m.ID == r.Image && isImage(point), nil
		}
	}
	return false, nil
}

// detachStale removes what is mounted at point though the daemon does not serve it: reads of
// it would fail, or worse. Who uses it keeps it.
func detachStale(point string) error {
	mounted, err := mountedAt(point)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for err == nil && mounted {
		if err = syscall.Unmount(point, syscall.MNT_DETACH|unmountNoFollow); err == nil {
			mounted, err = mountedAt(point)
		}
	}
	if err != nil {
		return fmt.Errorf("unmount what nobody serves at %s: %w", point, err)
	}
	return nil
}

// unmountNoFollow is UMOUNT_NOFOLLOW, which package syscall lacks.
const unmountNoFollow = 0x8

// name is what people call the image.
func (r record) name() string {
	if r.Reference == "" {
		return r.Image
	}
	return r.Reference
}
