// Package daemon is the only place where the parts meet: it opens images
// (admission, blobs), marks their cache files, mounts them through a helper
// process and answers the control API.
//
// It decodes no chunks and no kernel events itself. Read [Daemon] first, then
// image.go (what an open image holds) and watch.go (when a mark may go).
//
// Lock order: Daemon.mu alone. It guards the tables of images, mounts and
// watches; it is never held over I/O, a helper process or a wait.
package daemon
