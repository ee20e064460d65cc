// Package snapshotter is containerd's Snapshotter: containerd unpacks the layers of an image,
// and overlayfs stacks them, as containerd's own overlay snapshotter has it.
//
// Read [Snapshotter] first, then prepare.go and remove.go.
//
// # What is on the disk
//
//	metadata.db          containerd's metadata store: what exists
//	new/                 directories of snapshots that are being made
//	snapshots/ID/fs      an unpacked layer, or the upper directory of a container
//	snapshots/ID/work    overlayfs's work directory, of active snapshots
//	trash/               what was removed and is deleted in the background
//
// A directory without an entry in the store is garbage: removal deletes the entry, and
// everything else follows from what is on the disk, also after a crash at any moment. So
// Remove, Commit and Update, which containerd calls under its own locks, do nothing slow.
package snapshotter
