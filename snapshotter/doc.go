// Package snapshotter is containerd's Snapshotter for lazy images, and for ordinary ones
// as well.
//
// The layers of an ordinary image are unpacked by containerd and stacked by overlayfs, as
// its own overlay snapshotter does. Of a nydus image containerd unpacks only the layer with
// the bootstrap: the layers with data are answered as "already there" (the protocol of
// remote snapshots), and when a container wants the image its bootstrap is bound and mounted
// by the daemon, once for all containers, as the lowest layer of their overlays.
//
// The package fetches nothing and mounts nothing itself: a [Mounter] does, which the API's
// client is. Read [Snapshotter] first, then prepare.go and lazy.go.
//
// Logins for registries come with what a [Source] says, go to the daemon, and are kept
// nowhere; renew.go has the daemon told of others.
//
// # What is on the disk
//
//	metadata.db          containerd's metadata store: what exists
//	new/                 directories of snapshots that are being made
//	snapshots/ID/fs      an unpacked layer, or the upper directory of a container
//	snapshots/ID/work    overlayfs's work directory, of active snapshots
//	snapshots/ID/mnt     where the image is mounted whose bootstrap is in fs
//	snapshots/ID/image.json  what the daemon knows that image as; written before it is told
//	trash/               what was removed and is deleted in the background
//
// A directory without an entry in the store is garbage: removal deletes the entry, and
// everything else follows from what is on the disk, also after a crash at any moment. So
// Remove, Commit and Update, which containerd calls under its own locks, do nothing slow.
//
// # Locks
//
// The store's write transaction comes before the mutex of the table of images. The turn of an
// image is taken while the daemon is asked; neither of the two is held then.
package snapshotter
