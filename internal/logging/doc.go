// Package logging is where the daemon's log records go: nydusd's line shape or JSON, to
// standard error, journald or a file that is rotated by size.
//
// A record never waits for where it goes: it is put into a bounded queue, and one
// goroutine writes. A full disk or a reader that is slow loses records, which are counted
// and told of as soon as writing works again. The package knows nothing of the product
// and writes nothing of its own besides those reports. Read [Logger] first, then queue.go
// and file.go. Its one lock-free queue has no order to keep.
package logging
