// Package blobmgr keeps blobs in sparse cache files that the kernel reads directly,
// and makes ranges of them present on demand. It is the shared core of all
// transports: steps 5 to 11 of a read (docs/design.md, section 3).
//
// It never talks to a kernel interface, never knows a concrete backend, and never
// lets a byte into a cache file that did not match its chunk's digest.
//
// Read [Blob] first: [Blob.Fill] in fill.go, then flight.go, which is one fetch, and
// presence.go, which knows what is there. Then [Manager], which opens and shares
// blobs. readahead.go and completion.go are the two that fetch unasked; evict.go takes
// data away under readers, and room.go is the account that tells when.
//
// A cache directory holds for each blob: ID (after its domain and a comma, if it is in one), the plain bytes at their uncompressed
// offsets; ID.meta, its chunk table and digests; and ID.clean, the units that were
// verified and durable at the last orderly stop. No listed unit gets other bytes
// while the mark stands. What the cache file holds beyond it is suspect and is
// verified before anybody reads it. Marks go when the machine went down while the
// directory was in use (running.go), so what a mark vouches for and is wrong all the
// same was changed by somebody else: Scrub finds that.
//
// With cachefiles the cache file is the kernel's: attach.go. Then there is no ID and no
// ID.clean, and presence is what the file has. A machine may have another transport after
// its next boot: then what the other one has kept is a source, see sibling.go.
//
// Units (chunk.Unit) are what is present, absent, suspect or filling. Bits are set
// in this order: written, marked, waiters woken.
//
// Locks are taken in the order Manager.mu, Blob.digests, readahead.mu, Blob.mu, and
// none is held over I/O or a wait; the account of room.go comes after all. What must be held over I/O is a [turn], which is
// waited for with a context: Manager.names before Blob.durable.
//
//	m, err := blobmgr.New(blobmgr.Options{Dir: dir})
//	b, err := m.Open(ctx, blobmgr.Source{Entry: e, Store: store, Ref: ref, Digests: digests})
//	err = b.Fill(ctx, off, n) // b.File() holds the bytes now
package blobmgr
