package backendtest

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
)

// Mem is a store in memory. Its zero value is empty and usable.
type Mem struct {
	// mu guards blobs.
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
}

// Add keeps a copy of p and returns how to open it.
func (m *Mem) Add(p []byte) backend.Ref {
	d := digest.FromBytes(p)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blobs == nil {
		m.blobs = make(map[digest.Digest][]byte)
	}
	m.blobs[d] = slices.Clone(p)
	return backend.Ref{Digest: d, Size: int64(len(p))}
}

// Open opens a blob that was added.
func (m *Mem) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	p, ok := m.blobs[ref.Digest]
	m.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("open blob %s: %w", ref.Digest, fs.ErrNotExist)
	}
	if err := backend.CheckSize(ref, int64(len(p))); err != nil {
		return nil, err
	}
	return &memBlob{p: p}, nil
}

type memBlob struct {
	p      []byte
	closed atomic.Bool
}

func (b *memBlob) Size() int64 { return int64(len(b.p)) }

func (b *memBlob) Close() error {
	b.closed.Store(true)
	return nil
}

func (b *memBlob) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.closed.Load() {
		return os.ErrClosed
	}
	if err := backend.CheckRange(off, int64(len(p)), b.Size()); err != nil {
		return err
	}
	copy(p, b.p[off:])
	return nil
}
