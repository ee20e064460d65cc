// Package cachefilestest is the kernel's end of cachefiles in on-demand mode, for
// tests of its other end without privileges or a particular kernel.
//
// A [Kernel] has objects, which tests open, read and close as EROFS does, and a
// disk that keeps what was written to them. A daemon gets a [cachefiles.Device]
// whose system calls go to the Kernel: its descriptor is an eventfd under the real
// poller, read from it is what read(2) of /dev/cachefiles would give, and the files
// of objects are real descriptors too, so that a leak is found. A daemon can be
// killed and another one started, as if somebody else held the device.
//
// It encodes messages by itself, from include/uapi/linux/cachefiles.h, and so
// checks the codec too. It fails the test when a request is answered twice, never,
// or through another object's file; when a write is not aligned or comes before
// its object was accepted; and when a file stays open.
//
// What it does not have: whole-volume behaviour (a remount that hangs until CLOSE
// was read), the limits of free space, and a tree of directories; cull and inuse
// find objects by their paths in a table.
//
// Read first: [Kernel], [Object]; calls.go is the daemon's side. Locks: Kernel.mu,
// held over system calls that do not wait.
package cachefilestest
