package blobmgr

import (
	"context"
	"fmt"
	"os"
	"reflect"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/internal/chunk"
)

// A Source is one image's view of a blob.
type Source struct {
	Entry chunk.Entry
	// Domain is the scope in which images share the blob: letters, digits, dots, dashes
	// and underscores. Empty is a domain of its own.
	Domain string
	// Store and Ref say where the blob is. Store stays in use until the blob is closed
	// by the last image that opened it.
	Store backend.Store
	Ref   backend.Ref
	// Mirrored says that Store may ask mirrors: bytes that are wrong are read again from
	// the origin, see [backend.FromOrigin].
	Mirrored bool
	// MetaRef is the object that holds the chunk table when Entry has
	// chunk.FeatureSeparate.
	MetaRef backend.Ref
	// LocalTable is the chunk table in its local form, when the image brings it.
	LocalTable []byte
	// Prefetch is what the image wants fetched though nobody reads it.
	Prefetch Prefetch
	// Digests are the image's chunks of this blob. Only these can be filled.
	Digests []ChunkDigest
}

// scoped returns the name that id has in the cache directory: ids and domains have no
// comma.
func (s Source) scoped(id string) string {
	if s.Domain == "" {
		return id
	}
	return s.Domain + "," + id
}

// A ChunkDigest is a row of an image's chunk table.
type ChunkDigest struct {
	Index    int   // of the chunk in its blob
	Off, Len int64 // plain bytes in the cache file
	Digest   chunk.Digest
}

// maxOrigins bounds the stores that a blob remembers: the newest ones.
const maxOrigins = 8

// An origin is one place where a blob's bytes can be read. It is opened when the
// first byte is needed.
type origin struct {
	store    backend.Store
	ref      backend.Ref
	mirrored bool         // see Source
	turn     turn         // guards what follows
	blob     backend.Blob // nil until opened
	gone     bool
}

// newOrigin returns the place that s names.
func newOrigin(s Source) *origin {
	return &origin{store: s.Store, ref: s.Ref, mirrored: s.Mirrored, turn: newTurn()}
}

// same reports whether o reads from where s does.
func (o *origin) same(s Source) bool {
	return o.ref == s.Ref && reflect.TypeOf(o.store).Comparable() && reflect.TypeOf(o.store) == reflect.TypeOf(s.Store) && o.store == s.Store
}

// open returns the open blob. want is the end of its chunk data.
func (o *origin) open(ctx context.Context, want int64) (backend.Blob, error) {
	if err := o.turn.take(ctx); err != nil {
		return nil, err
	}
	defer o.turn.give()
	if o.gone {
		return nil, os.ErrClosed
	}
	if o.blob != nil {
		return o.blob, nil
	}
	b, err := o.store.Open(ctx, o.ref)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	if b.Size() < want {
		b.Close()
		return nil, fmt.Errorf("the store has %d bytes of it and its chunks end at %d: it is cut off or not the same blob", b.Size(), want)
	}
	o.blob = b
	return b, nil
}

// close closes the blob; who still reads from it goes on to the next origin. It
// waits for an open that is under way, which ends with the blob's base context.
func (o *origin) close() error {
	o.turn <- struct{}{}
	defer o.turn.give()
	o.gone = true
	if o.blob == nil {
		return nil
	}
	return o.blob.Close()
}

// readTable gets the chunk table of s from the image or, failing that, the store.
func readTable(ctx context.Context, s Source) (*chunk.Table, error) {
	if len(s.LocalTable) > 0 {
		return chunk.ParseTable(s.LocalTable, s.Entry)
	}
	ref := s.Ref
	if s.Entry.Features&chunk.FeatureSeparate != 0 {
		ref = s.MetaRef
	}
	b, err := s.Store.Open(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("open for its chunk table: %w", err)
	}
	defer b.Close()
	return chunk.ReadTable(ctx, b, s.Entry)
}

// compare reports whether the digests of s fit t, and how many are new. It changes
// nothing. The error is a *chunk.ConflictError when the two are about different
// blobs.
func compare(t *chunk.Table, ds []ChunkDigest) (changed int, err error) {
	for _, d := range ds {
		if d.Index < 0 || d.Index >= t.Len() {
			return 0, fmt.Errorf("image names chunk %d of a blob of %d chunks: %w", d.Index, t.Len(), chunk.ErrCorrupt)
		}
		if d.Digest == (chunk.Digest{}) {
			return 0, fmt.Errorf("image has no digest for chunk %d: %w", d.Index, chunk.ErrCorrupt)
		}
		c := t.Chunk(d.Index)
		if c.Off != d.Off || c.Len != d.Len || c.Known && c.Digest != d.Digest {
			return 0, &chunk.ConflictError{
				Chunk: d.Index, Off: c.Off, Len: c.Len, WantOff: d.Off, WantLen: d.Len, Have: c.Digest, Want: d.Digest,
			}
		}
		if !c.Known {
			changed++
		}
	}
	return changed, nil
}

// learn records the digests of s, which compare accepted, and returns the units of
// the new ones. An error means that s contradicts itself.
func learn(t *chunk.Table, ds []ChunkDigest) (units []int, err error) {
	for _, d := range ds {
		changed, err := t.SetDigest(d.Index, d.Off, d.Len, d.Digest)
		if err != nil {
			return units, err
		}
		if changed {
			units = append(units, t.UnitOf(d.Index))
		}
	}
	return units, nil
}
