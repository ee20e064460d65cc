// Package nydusd has a nydusd that somebody else runs serve the snapshotter's images: a
// [Daemon] offers of the snapshotter's API what nydusd can do, by nydusd's own.
//
// There are two ways, and nydusd says which is its own. As `nydusd singleton --fscache` it
// answers for the kernel's cache, and the images are mounted here, by the kernel's EROFS
// ([fscache]). As FUSE daemon it mounts them in its own file system, from where they are
// bound to where the snapshotter wants them ([fuse]).
//
// nydusd cannot be asked which images it knows (2.2 to 2.4 end when they are), so what is
// remembered here is the table of mounts, a record for each image (its blobs, no login), and
// what nydusd has said since it was found ([Daemon.Begin]). An image has its own domain and
// its own directory: nydusd forgets blobs that two images of a domain have when the first of
// them goes, and reads them with the first one's login.
package nydusd
