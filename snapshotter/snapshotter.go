package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/continuity/fs"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// A Snapshotter is containerd's. It is safe for concurrent use; Close ends it.
type Snapshotter struct {
	root    string
	store   *storage.MetaStore
	overlay []string // options of every overlay
	log     *slog.Logger

	mounter Mounter
	source  Source
	find    Finder // nil: nobody to ask
	scope   Scope
	images  *images
	shares  *shares
	wishes  wishes
	recover chan struct{} // images may have to be mounted again; capacity 1
	renewal Renewal       // of logins; the zero value: none

	mountTime time.Duration // that constant, but in tests

	loginLabel sync.Once // a label with a login was seen, and that was said

	sweeping turn // who removes garbage
	garbage  *garbage

	ctx        context.Context // of the background; ends with Close
	stop       context.CancelFunc
	background sync.WaitGroup
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// An Opt changes what New makes.
type Opt func(*Snapshotter)

// WithLogger has events logged; without it nothing is.
func WithLogger(log *slog.Logger) Opt { return func(s *Snapshotter) { s.log = log } }

// WithOverlayOptions adds options to every overlay mount.
func WithOverlayOptions(options ...string) Opt {
	return func(s *Snapshotter) { s.overlay = append(s.overlay, options...) }
}

// WithFinder has f asked for references that no label names.
func WithFinder(f Finder) Opt { return func(s *Snapshotter) { s.find = f } }

// WithScope says which images share blobs; without it all do.
func WithScope(scope Scope) Opt { return func(s *Snapshotter) { s.scope = scope } }

// New opens the snapshotter whose directory is root, which it makes if there is none. Lazy
// images are mounted by m, with data from where source says. It asks neither: a daemon that
// is not there yet is no reason not to serve. The
// error says what is wrong with the directory or its store; a store that another process
// has open is one after ten seconds.
func New(root string, m Mounter, source Source, opts ...Opt) (*Snapshotter, error) {
	root, err := prepareRoot(root)
	if err != nil {
		return nil, fmt.Errorf("open snapshotter: %w", err)
	}
	s := &Snapshotter{
		root: root, log: slog.New(slog.DiscardHandler),
		mounter: m, source: source, scope: ScopeAll, images: newImages(), shares: newShares(), recover: make(chan struct{}, 1),
		sweeping: make(turn, 1), garbage: newGarbage(), mountTime: mountTime,
	}
	for _, o := range opts {
		o(s)
	}
	if err := s.completeOptions(); err != nil {
		return nil, fmt.Errorf("open snapshotter: %w", err)
	}
	if err := s.openStore(); err != nil {
		return nil, err
	}
	failpoint.Hit("snapshotter.opened")
	// What was being made or removed when the last process ended has no entry.
	err = emptyDir(context.Background(), s.path(newDir))
	if err == nil {
		_, err = s.discard(context.Background(), true)
	}
	if err == nil {
		err = s.readShares()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open snapshotter: put away what was not completed: %w", err), s.store.Close())
	}
	failpoint.Hit("snapshotter.tidied")
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.background.Go(s.sweepOn)
	s.garbage.look()
	s.background.Go(s.recoverOn)
	s.Recover()
	if s.renewal.Look > 0 {
		s.background.Go(s.renewOn)
	}
	return s, nil
}

// The directories below the root.
const (
	snapshotsDir = "snapshots"
	newDir       = "new"
	trashDir     = "trash"
)

// prepareRoot makes the directories and returns root's absolute path without links: mount
// options and the table of mounts have it.
func prepareRoot(root string) (string, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return "", err
	}
	if root, err = filepath.EvalSymlinks(root); err != nil {
		return "", err
	}
	if strings.ContainsAny(root, ",:\\\"") {
		return "", fmt.Errorf("root %q: overlayfs's options cannot name a path with a comma, colon, quote or backslash; choose another", root)
	}
	types, err := fs.SupportsDType(root)
	if err != nil {
		return "", fmt.Errorf("look at the file system of %s: %w", root, err)
	}
	if !types {
		return "", fmt.Errorf("the file system of %s has no d_type, which overlayfs needs: for XFS format it with ftype=1", root)
	}
	for _, name := range []string{snapshotsDir, newDir, trashDir} {
		if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return "", err
		}
	}
	return root, nil
}

// completeOptions adds what overlayfs needs here.
func (s *Snapshotter) completeOptions() error {
	if !hasOption(s.overlay, "userxattr") {
		need, err := overlayutils.NeedsUserXAttr(s.root)
		if err != nil {
			return fmt.Errorf("ask whether overlayfs needs userxattr: %w", err)
		}
		if need {
			s.overlay = append(s.overlay, "userxattr")
		}
	}
	// A layer is the upper directory of one overlay and a lower one of others, which the
	// index would refuse.
	_, err := os.Stat("/sys/module/overlay/parameters/index")
	if err == nil && !hasOption(s.overlay, "index") {
		s.overlay = append(s.overlay, "index=off")
	}
	return nil
}

func hasOption(options []string, name string) bool {
	for _, o := range options {
		if key, _, _ := strings.Cut(o, "="); key == name {
			return true
		}
	}
	return false
}

// path returns a path below the root.
func (s *Snapshotter) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

// upper is the directory of a snapshot's own files.
func (s *Snapshotter) upper(id string) string { return s.path(snapshotsDir, id, "fs") }

// Stat returns what is known of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Walk calls fn for each snapshot that one of the filters matches; with none for all. They
// are as they were when it was called: no transaction waits for fn, which may be slow.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	var list []snapshots.Info
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			list = append(list, info)
			return nil
		}, filters...)
	})
	if err != nil {
		return err
	}
	for _, info := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// Close ends what goes on in the background and closes the store. Nothing else may be
// called at that time or later. Mounts and snapshots stay as they are.
func (s *Snapshotter) Close() error {
	s.stop()
	s.background.Wait()
	return s.store.Close()
}
