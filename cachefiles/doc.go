// Package cachefiles serves EROFS mounts through the kernel's cachefiles in
// on-demand mode (Linux 5.19 to 7.1; fs/cachefiles/ondemand.c).
//
// The kernel makes a sparse file for each object (a blob, or an image's
// metadata) and reads it itself. It asks for what it needs by messages on
// /dev/cachefiles: OPEN brings the file to be filled, READ names a range that is a
// hole, CLOSE ends the object. The package turns OPEN into [Handler.Open], READ
// into [Object.Fill] and CLOSE into [Object.Close], and answers.
//
// It never fetches, never mounts, and knows neither blobs nor digests. It never
// touches the kernel's tree below the cache root, but for what it finds in the
// graveyard.
//
// # Order
//
//  1. [Open] the device and [Device.Bind] it, or [NewDevice] with one that an
//     earlier daemon bound, then [Device.Restore], once and before Serve;
//  2. [NewServer] and [Server.Serve];
//  3. mount, from another process that has none of our descriptors: a daemon that
//     is killed inside its own mount never dies.
//
// and at the end: unmount, end Serve, [Device.Close]. When the device's last
// descriptor is closed with images mounted, those mounts are dead for ever: reads
// of what is not in memory fail with EIO (they never give zeros). So somebody else
// keeps a duplicate of [Device.File] for the daemon's successor.
//
// # Writes
//
// A [File] takes whole pages from page-aligned memory only, because Linux 6.1
// puts other writes at a wrong place without an error. There is no way to
// flush a file, and no way to tell a reader an error: a READ that is completed
// while its range is a hole gives EIO, and the next read asks again.
//
// # Reading the code
//
// Read first: [Server] and session (server.go), then object.go (OPEN, CLOSE) and
// read.go (READ), which follow one request from the kernel and back; codec.go is
// the wire format. A read came from EROFS and goes on in the Object, which is a
// blob of package blobmgr.
//
// Locks: session.mu guards the tables of one Serve and is never held over a system
// call, a wait or a call of an Object. There is no other.
package cachefiles
