// Package chunk knows how a RAFS v6 data blob stores its content: the blob table
// entry that describes it (rafs-v6-format 1.5), the chunk table at its end (3.3), the
// TOC (3.2), and the codecs and digests of the chunks. It reads all forms that
// nydus-image writes except zran, encrypted, tarfs and external blobs, which are
// refused with [errors.ErrUnsupported], and writes the one that the converter makes.
//
// It never opens, caches or retries anything: bytes come through a [ReaderAt] or
// as slices, and decoded bytes go into the caller's buffer. No input makes it
// allocate more than the blob table entry declares and the format allows.
//
// Read [Table] first: the geometry that maps the cache file to the blob, and the
// digests that decide whether a byte is right. Then [Decoder]: the only way from
// stored bytes to bytes that a cache file may hold.
//
//	e, err := chunk.ParseEntry(raw)            // 256 bytes of the bootstrap
//	t, err := chunk.ReadTable(ctx, blob, e)    // one read of the blob
//	changed, err := t.SetDigest(i, off, n, d)  // for each row of the bootstrap's chunk table
//	u := t.UnitAt(off)                         // what the kernel asked for
//	err = decoder.Decode(t, u, dst, src)       // dst may be written to the cache file
//
// There are no locks: a Table may be read by any number of goroutines while none
// calls SetDigest, a Decoder and an Encoder belong to one goroutine at a time.
package chunk
