// Package erofs reads, checks, writes and mounts the metadata of EROFS images:
// RAFS v6 bootstraps, which name chunks of data blobs, and plain uncompressed
// EROFS.
//
// It never touches file data or the network and knows no compression. It trusts
// no image: no method panics, hangs or takes memory without bound, whatever the
// bytes are.
//
// Read [Image] first, the reading side, then [Check], which every image passes
// before [Mount] shows it to the kernel. [Write] makes a bootstrap from a tree of
// [Node]s. The numbers of the format are in disk.go and writer_layout.go; sections
// named rafs-v6-format are of that reference.
//
// Locks: only the page cache of an Image has one, held for a few instructions.
package erofs
