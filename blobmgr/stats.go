package blobmgr

import "time"

// Stats of a blob. All sizes are in bytes.
type Stats struct {
	Size     int64 // of the cache file
	Needed   int64 // of it, what the images can read
	Present  int64 // of it, what is there
	Fetched  int64 // stored bytes read from backends since Open
	Requests int64 // reads from backends since Open
	Reused   int64 // bytes from what another transport had kept, since Open
	Unasked  int64 // of Fetched, by completion and prefetch
	Workers  int   // requests of it that may be under way at a time
	Chunks   int   // of the blob
	Corrupt  int64 // units since Open whose bytes were wrong
	// UnaskedRequests is how many requests brought Unasked, and the times are the end of
	// the first and of the last of them, zero before.
	UnaskedRequests            int64
	UnaskedSince, UnaskedUntil time.Time
	Complete                   bool // all that is needed is there and durable
}

// Stats returns the state of b.
func (b *Blob) Stats() Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return Stats{
		Size: b.size, Needed: b.needed, Present: b.stored.Load(),
		Fetched: b.fetched.Load(), Requests: b.requests.Load(), Reused: b.reused.Load(), Unasked: b.unasked.bytes, UnaskedRequests: b.unasked.requests,
		UnaskedSince: b.unasked.since, UnaskedUntil: b.unasked.until, Workers: b.prefetch.workers(),
		Chunks: b.table.Len(), Corrupt: b.corrupt.Load(),
		Complete: b.complete,
	}
}
