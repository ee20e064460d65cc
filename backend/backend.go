// Package backend reads immutable blobs from somewhere slow: a registry, an
// object store, a directory.
//
// It never caches and knows no chunks. Read [Store] and [Blob] first, then one
// decorator ([Retry]). Before it in a read comes blobmgr, after it the network.
// Its locks are leaves: none is held while a store or blob is called.
package backend

import (
	"context"

	"github.com/opencontainers/go-digest"
)

// A Store opens blobs. Implementations are safe for concurrent use.
type Store interface {
	// Open resolves ref to a readable blob: it authenticates, follows redirects
	// and learns the size. The error is fs.ErrNotExist, fs.ErrPermission or a
	// *StatusError where one of them applies. When ref.Size is not 0 and the
	// store knows another size, Open fails and says both. A store to which that
	// would cost a round trip may trust ref.Size and report all this from the
	// first ReadAt.
	Open(ctx context.Context, ref Ref) (Blob, error)
}

// A Blob is an immutable run of bytes kept somewhere slow. Its methods are safe
// for concurrent use.
type Blob interface {
	// ReadAt fills p from offset off. It never returns a partial result: either
	// all of p is filled and the error is nil, or p's contents are undefined.
	// A range past Size is an error. Parallel calls are allowed.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Size is the number of bytes of the blob.
	Size() int64
	// Close releases the blob. It is idempotent; ReadAt after it fails with
	// os.ErrClosed.
	Close() error
}

// Ref names a blob: where, and what its bytes must hash to.
type Ref struct {
	Host, Repository string // registry only
	Digest           digest.Digest
	Size             int64 // bytes; 0: ask the store
}
