// Package daemon is the only place where the parts meet: it opens images
// (admission, blobs), mounts them through a helper process, answers the kernel
// by one of the two transports, keeps or removes what was fetched, and answers
// the control API.
//
// It decodes no chunks and no kernel requests itself. Read [Daemon] first, then
// image.go (what an open image holds), transport.go (what the kernel is to the
// daemon) and the two that are one: fanotify.go (marks, and when they may go)
// and cachefiles.go (objects, and what is behind them). kept.go and record.go are
// about images that are not mounted.
//
// Locks: Daemon.mu, then cachefilesTransport.mu. They guard tables (of images,
// mounts, devices; of objects) and are never held over a helper process, the
// network or a wait.
package daemon
