package scenario

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A fakeKernel is what differs between the two fake kernels.
type fakeKernel interface {
	// connect returns what a new daemon gets.
	connect(t testing.TB) daemon.FakeKernel
	// mount is what mount(2) does; its error is an errno.
	mount(ctx context.Context, s daemon.MountSpec) (*superblock, error)
	// sever ends the daemon's calls, as its death does, and then gone what still waits
	// for it, unless somebody holds the kernel's descriptors.
	sever()
	gone()
	// awaitMount returns when a mount waits for the severed daemon.
	awaitMount(t testing.TB)
	fail(err error) // what writes to the cache meet from now on; nil: nothing
}

// An inProcess drives a daemon in this process, on a fake kernel. What it cannot show
// is what only a process does: a daemon that is killed still closes its files, and
// notes in its cache what is there.
type inProcess struct {
	*fakeMounts
	options daemon.Options
	socket  string
	kernel  fakeKernel

	output testenv.Buffer
	cancel context.CancelFunc // of the daemon's contexts
	force  context.CancelFunc
	ended  chan struct{}
	err    error // of the daemon; final when ended is closed
}

func newInProcess(t testing.TB, r Row, c config, root, socket string) *inProcess {
	t.Helper()
	p := &inProcess{socket: socket, options: daemon.Options{
		Root: root, NoCompletion: !c.completion, FillTimeout: c.fillTimeout, Transport: r.Transport,
		Handover: c.held && r.Transport == cachefilesTransport,
	}}
	p.options.Logger = slog.New(slog.NewTextHandler(&p.output, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if r.Transport == cachefilesTransport {
		p.kernel = newFakeCachefiles(t, c.held)
	} else {
		p.kernel = newFakeFanotify(c.fillTimeout)
	}
	p.fakeMounts = &fakeMounts{kernel: p.kernel, mounted: map[string]*superblock{}}
	return p
}

func (p *inProcess) start(t testing.TB) {
	t.Helper()
	o := p.options
	o.Kernel = p.kernel.connect(t)
	o.Kernel.Mounter = p.fakeMounts
	p.dead.Store(false)
	var ctx, force context.Context
	ctx, p.cancel = context.WithCancel(context.Background())
	force, p.force = context.WithCancel(context.Background())
	p.ended, p.err = make(chan struct{}), nil
	c, err := daemon.NewControl(o, p.socket)
	if err != nil {
		t.Fatal(err)
	}
	go func(ended chan struct{}) {
		defer close(ended)
		p.err = c.Run(ctx, force, p.socket)
	}(p.ended)
}

func (p *inProcess) failed() error {
	select {
	case <-p.ended:
		return p.err
	default:
		return nil
	}
}

func (p *inProcess) log() string { return p.output.String() }

func (p *inProcess) stop(t testing.TB) {
	t.Helper()
	p.cancel()
	p.force() // nothing may be in use any more
	<-p.ended
	if p.err != nil {
		t.Errorf("the daemon: %v", p.err)
	}
}

func (p *inProcess) kill(t testing.TB) {
	t.Helper()
	p.dead.Store(true)
	p.kernel.sever()
	p.kernel.gone()
	p.cancel()
	p.force()
	<-p.ended
}

func (p *inProcess) killMounting(t testing.TB, mount func() error, _ func()) {
	t.Helper()
	reached := make(chan struct{})
	p.before.Store(new(func() {
		p.kernel.sever()
		close(reached)
	}))
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		if mount() == nil {
			t.Error("a daemon that was killed has answered")
		}
	}()
	<-reached
	p.before.Store(nil)
	p.kernel.awaitMount(t)
	p.kill(t)
	<-asked
}

func (p *inProcess) fill(testing.TB) { p.kernel.fail(unix.ENOSPC) }

func (p *inProcess) empty(testing.TB) { p.kernel.fail(nil) }

// fakeMounts is a table of mounts, and the daemon's Mounter.
type fakeMounts struct {
	kernel fakeKernel
	dead   atomic.Bool            // the daemon's helpers do nothing any more
	before atomic.Pointer[func()] // called before a mount

	mu      sync.Mutex // guards what follows, and the fields of superblocks that say so
	minor   int        // the last that was given
	mounted map[string]*superblock
}

var _ daemon.Mounter = (*fakeMounts)(nil)

// Mount mounts at s.Target.
func (m *fakeMounts) Mount(ctx context.Context, s daemon.MountSpec) error {
	if before := m.before.Load(); before != nil {
		(*before)()
	}
	if s.Clone != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		sb := m.mounted[s.Clone.Point]
		if sb == nil || sb.minor != s.Clone.Minor {
			return syscall.ENOENT
		}
		sb.users++
		m.mounted[s.Target.Name()] = sb
		return nil
	}
	sb, err := m.kernel.mount(ctx, s)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.minor++
	sb.minor, sb.source, sb.users = m.minor, s.Bootstrap.Name(), 1
	m.mounted[s.Target.Name()] = sb
	return nil
}

// Unmount is what the daemon's helper does.
func (m *fakeMounts) Unmount(_ context.Context, point string, detach bool) error {
	if m.dead.Load() {
		return syscall.ESRCH
	}
	return m.unmount(point, detach)
}

// abandon unmounts behind the daemon's back.
func (m *fakeMounts) abandon(point string) error { return m.unmount(point, true) }

func (m *fakeMounts) unmount(point string, detach bool) error {
	m.mu.Lock()
	sb := m.mounted[point]
	switch {
	case sb == nil:
		m.mu.Unlock()
		return syscall.EINVAL
	case !detach && sb.files > 0:
		m.mu.Unlock()
		return syscall.EBUSY
	}
	delete(m.mounted, point)
	m.mu.Unlock()
	m.drop(sb, 0)
	return nil
}

// drop takes a mount away from sb, or with files 1 an open file. The last user closes
// what the kernel has open.
func (m *fakeMounts) drop(sb *superblock, files int) {
	m.mu.Lock()
	sb.users--
	sb.files -= files
	last := sb.users == 0
	m.mu.Unlock()
	if last {
		sb.close()
	}
}

// Mounted lists the mounts.
func (m *fakeMounts) Mounted() ([]daemon.Mounted, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []daemon.Mounted
	for point, sb := range m.mounted {
		list = append(list, daemon.Mounted{Point: point, Source: sb.source, Minor: sb.minor})
	}
	return list, nil
}

func (m *fakeMounts) view(point string) fileSystem { return fakeView{m, point} }

// use returns what is mounted at a place, for a file to be opened in it.
func (m *fakeMounts) use(point string) (*superblock, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	sb := m.mounted[point]
	if sb == nil {
		return nil, syscall.ENOENT
	}
	sb.users++
	sb.files++
	return sb, nil
}
