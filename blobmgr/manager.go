package blobmgr

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/prometheus/client_golang/prometheus"
)

// Options of a Manager. Dir must be set.
type Options struct {
	// Dir is the cache directory. It is made when missing, with mode 0700, and
	// belongs to one Manager of one process.
	Dir string
	// Logger gets what nobody waits for. Nil: nothing is logged.
	Logger *slog.Logger
	// Registerer gets the metrics. Nil: they are kept to ourselves.
	Registerer prometheus.Registerer
	// MemoryLimit bounds all buffers, in bytes; at least 4 MiB. Default 24 MiB.
	MemoryLimit int64
	// NoCompletion turns off fetching the rest of a blob after its first reads.
	NoCompletion bool
	// CompletionDelay is how long nobody must have missed anything before that
	// starts. Default 1 s.
	CompletionDelay time.Duration
	// Readahead is the first readahead window of a stream of reads, in stored
	// bytes. Default 256 KiB; negative: none at all.
	Readahead int64
	// Attached says that cache files are not made here: the kernel hands them over
	// while it has them open, see [Blob.Attach]. Dir has the chunk tables only.
	Attached bool

	// Sibling returns the path of the file that cachefiles has kept of the blob called id,
	// as [Blob.ID] returns it, in a domain; empty: none. What is right in it is not fetched.
	// With Attached it is not asked: there the sibling is the cache file of a Manager that
	// Dir had before. Nil: there are none.
	Sibling func(domain, id string) string

	// Disown removes for good what the kernel's cache has of the blob called id, size bytes
	// long, in a domain: with Attached it is asked before a chunk table is kept where none
	// was, because nobody can say which digests that was checked against, and the kept table
	// would vouch for it. It may wait; its error is that of Open. Nil: the kernel has nothing.
	Disown func(ctx context.Context, domain, id string, size int64) error

	// RoomWait is how long a read waits at most for room in a full cache; 0: 20 s. Whoever
	// asks with a deadline needs time after it to fetch.
	RoomWait time.Duration

	// Inherited returns a descriptor of the cache file of that name, which an earlier process
	// opened before the file was watched and which is the caller's own; nil if there is
	// none. It is used in place of a new one, if it is still that file. Nil: there are none.
	Inherited func(name string) *os.File

	// Of tests:
	wrap    func(cacheFile) cacheFile   // disk errors
	wrapDir func(fileSystem) fileSystem // disk errors, and what a power cut leaves
	boot    string                      // the machine's boot id
}

// A Manager opens blobs and shares them between images. It is safe for concurrent
// use.
type Manager struct {
	opt     Options
	log     *slog.Logger
	dir     *directory
	memory  *memory
	metrics *metrics
	// completions holds a token for each running request of all completions.
	completions chan struct{}
	quiet       quiet
	room        *room
	clock       atomic.Uint32 // in ticks, see Tick; from 1
	scrubbing   turn

	mu     sync.Mutex // guards what follows
	closed bool
	names  map[string]*name
	// doubted are blobs whose kept chunk tables may be wrong.
	doubted   map[string]bool
	siblings  map[*sibling]bool       // that are open
	stopScrub context.CancelCauseFunc // nil: there was none
}

// A name is a cache file in use, or about to be.
type name struct {
	turn  turn  // serialises open, share and close
	users int   // who holds or waits for turn, and the blob's images
	blob  *Blob // guarded by turn
}

// New returns a Manager of the cache directory o.Dir. Another process that uses it
// is an error.
func New(o Options) (*Manager, error) {
	if o.MemoryLimit != 0 && o.MemoryLimit < minMemory {
		return nil, fmt.Errorf("memory limit of %d bytes, want %d at least", o.MemoryLimit, minMemory)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.CompletionDelay == 0 {
		o.CompletionDelay = time.Second
	}
	if o.Readahead == 0 {
		o.Readahead = firstWindow
	}
	dir, err := openDirectory(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open cache directory: %w", err)
	}
	if o.wrapDir != nil {
		dir.sys = o.wrapDir(dir.sys)
	}
	if err := dir.begin(cmp.Or(o.boot, bootID()), o.Logger); err != nil {
		return nil, errors.Join(fmt.Errorf("open cache directory: %w", err), dir.Close())
	}
	m := &Manager{
		opt: o, log: o.Logger, dir: dir,
		memory:      newMemory(o.MemoryLimit),
		metrics:     newMetrics(o.Registerer),
		completions: make(chan struct{}, completionRequests),
		names:       make(map[string]*name),
		room:        newRoom(o.RoomWait),
		doubted:     make(map[string]bool),
		siblings:    make(map[*sibling]bool),
		scrubbing:   newTurn(),
	}
	m.clock.Store(1)
	return m, nil
}

// Open returns the blob that s describes; each Open is given back by one
// Blob.Close. A blob that is open already is shared within its domain, and s.Store
// becomes the first of its sources. When s disagrees with what is kept under the same
// id (a forged image among several), or the kernel's file has batches without what s needs
// of them, it gets a cache file of its own.
//
// With a chunk table at hand (an earlier Open, s.LocalTable) the store is not
// asked; otherwise the table is read here. An error leaves nothing behind.
func (m *Manager) Open(ctx context.Context, s Source) (*Blob, error) {
	// The entry may come from anywhere: its id becomes a file name.
	raw := s.Entry.Marshal()
	if _, err := chunk.ParseEntry(raw[:]); err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	if taken(s.Entry.ID) {
		return nil, fmt.Errorf("open blob %s: its id is what the cache calls a file of another blob: give it another", s.Entry.ID)
	}
	b, err := m.open(ctx, s.scoped(s.Entry.ID), s)
	switch {
	case errors.Is(err, errPartial):
		m.log.Info("images use different chunks of the same batches of a blob; they do not share it", "blob", s.Entry.ID)
		b, err = m.open(ctx, s.scoped(variant(s)), s)
	case errors.Is(err, errOther):
		m.log.Warn("images disagree about a blob, one of them is damaged or forged; they do not share it", "blob", s.Entry.ID, "err", err)
		b, err = m.open(ctx, s.scoped(variant(s)), s)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", s.Entry.ID, err)
	}
	return b, nil
}

// taken reports whether id could be a file that belongs to another blob's.
func taken(id string) bool {
	return slices.ContainsFunc([]string{metaSuffix, cleanSuffix, tmpSuffix}, func(s string) bool { return strings.HasSuffix(id, s) })
}

// errOther marks that a name is in use for another blob.
var errOther = errors.New("the cache has another blob of this id")

func (m *Manager) open(ctx context.Context, file string, s Source) (*Blob, error) {
	n, err := m.take(ctx, file)
	if err != nil {
		return nil, err
	}
	defer n.turn.give()
	if n.blob == nil {
		n.blob, err = m.newBlob(ctx, file, s)
	} else {
		err = n.blob.share(ctx, s)
	}
	if err != nil {
		m.drop(file, n)
		return nil, err
	}
	return n.blob, nil
}

// take enters the caller as a user of file and waits for its turn.
func (m *Manager) take(ctx context.Context, file string) (*name, error) {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, os.ErrClosed
	}
	n := m.names[file]
	if n == nil {
		n = &name{turn: newTurn()}
		m.names[file] = n
	}
	n.users++
	m.mu.Unlock()
	if err := n.turn.take(ctx); err != nil {
		m.drop(file, n)
		return nil, err
	}
	m.mu.Lock()
	closed := m.closed
	m.mu.Unlock()
	if closed {
		n.turn.give()
		m.drop(file, n)
		return nil, os.ErrClosed
	}
	return n, nil
}

// drop takes a user away.
func (m *Manager) drop(file string, n *name) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n.users--; n.users == 0 {
		delete(m.names, file)
	}
}

// release gives back one Open of b and closes b after the last.
func (m *Manager) release(b *Blob) error {
	m.mu.Lock()
	n := m.names[b.name]
	m.mu.Unlock()
	if n == nil {
		return nil
	}
	n.turn <- struct{}{} // held for bounded times only, and Close has no context
	defer n.turn.give()
	if n.blob != b {
		return nil
	}
	defer m.drop(b.name, n)
	if b.images--; b.images > 0 {
		return nil
	}
	n.blob = nil
	return b.close()
}

// Close closes every blob that is still open. It is idempotent.
func (m *Manager) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	var open []*name
	for _, n := range m.names {
		open = append(open, n)
	}
	m.mu.Unlock()
	m.endScrub()
	var errs []error
	for _, n := range open {
		n.turn <- struct{}{}
		if n.blob != nil {
			errs = append(errs, n.blob.close())
			n.blob = nil
		}
		n.turn.give()
	}
	m.memory.Close()
	if errors.Join(errs...) == nil {
		errs = append(errs, m.dir.end())
	}
	return errors.Join(append(errs, m.dir.Close())...)
}
