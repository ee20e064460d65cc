// Package fanotify serves reads of sparse files through the kernel's pre-access
// events (FAN_PRE_ACCESS, Linux 6.14 and later; fs/notify/fanotify).
//
// A file with a mark suspends whoever is about to read it, which for a
// file-backed EROFS mount is the task that reads below the mount. The event
// names the range; the reader goes on once the group's owner has answered. The
// package turns each event into [Object.Ready] and, where that says no,
// [Object.Fill], and answers: allowed, or denied with EIO.
//
// It never fetches, never writes to a watched file, never mounts, and knows
// neither blobs nor digests. What it cannot make sense of it denies: an event of
// an unknown file, an event without a range, a mask or a length that is wrong.
//
// # Order
//
// Whether an open file raises events is decided when it is opened, by the marks
// of that moment (fs/notify/fsnotify.c, 6.18). Hence:
//
//  1. create the file with its full size and open it for writing;
//  2. [Group.Watch] with that descriptor, which therefore raises nothing itself:
//     a descriptor opened later makes its own process wait for itself;
//  3. [Group.Serve];
//  4. mount. A mount before the mark reads holes as zeros, without an error.
//
// and at the end: unmount, then [Group.Unwatch], then end Serve, then
// [Group.Close].
//
// # Fail open
//
// The kernel lets everybody through when it has nobody to ask: when the last
// descriptor of the group is closed, be it by Close, exit or SIGKILL, all
// waiting readers and all later ones get ZEROS WITH SUCCESS from every hole. The
// same holds for a mark that is removed from an incomplete file. Whoever serves a
// mount keeps a duplicate of [Group.File] in a second process.
//
// # Taking over
//
// While that process lives, the death of the one that serves only makes readers
// wait: for what is in the queue, and for what was taken from it, which the kernel
// knows by the descriptor numbers of the dead. [Options].Journal, kept there too,
// says at any moment what that is. The next process
//
//  1. calls [Reserve] before it opens anything, so that no new event gets a number
//     of an old one;
//  2. gets the group, and the cache files as the first process had opened them,
//     and makes its Group with [NewGroupFromFile];
//  3. calls [Group.Expect] for every file that has a mark;
//  4. calls [Group.Serve], which answers what was left, each as its own Fill went,
//     while it serves new events.
//
// No reader sees an error for that. Two processes must never serve at a time: the
// first one is dead, or has ended Serve for good. One that ends on purpose and wants
// its successor to answer does not end Serve, which denies, but exits.
//
// # Reading the code
//
// Read first: [Group] (group.go) and server (server.go, fill.go), whose comments
// follow one event from the kernel and back; codec.go is the wire format. A read came
// from EROFS and goes on in the Object, which is a blob of package blobmgr. Then
// journal.go, with the order of all that is written there, takeover.go, and headroom.go
// for what happens when memory ends.
//
// Locks: Group.mu guards the table of files and is never held over a system
// call or a call of an Object. journal.mu counts who uses the memory, and
// Reservation.mu guards its numbers; none is held while another is taken.
package fanotify
