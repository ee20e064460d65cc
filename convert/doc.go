// Package convert turns a root file system (a directory, a tar file, an OCI
// layout) into a lazy image: data blobs of compressed chunks and one RAFS v6
// bootstrap that names them.
//
// Sources are read layer by layer, lowest first. Each layer becomes an overlay
// on the tree below it ([layer] in layer.go) while its file data stream through
// the [packer] (pack.go): cut, digest, look up, compress, append. What is left
// is one tree, written by erofs.Write, and the blobs that it refers to.
//
// The same input gives the same bytes, whatever the number of processors and
// workers. Nothing is ever written outside the destination and TempDir: a tar's
// paths exist only in memory. convert never mounts, never talks to the daemon
// and never keeps a whole file in memory.
//
// Locks: packer.mu and reporter.mu, never both; nothing waits while holding one.
package convert
