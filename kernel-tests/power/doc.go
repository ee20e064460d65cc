// Package power cuts the power while the daemon works, and looks at what its cache says
// afterwards: a cut may cost what has to be fetched again, never a wrong byte.
//
// QEMU logs every write and flush of the disk below the cache (its block driver
// blklogwrites). A [Log] replays that up to any point, a [Cut], onto a copy of the disk as
// it was before. As of a real disk, what was not flushed at the cut may be there, or not, or
// be torn. On each such disk a daemon is started, and everything is read and compared.
//
// Which disk, kernel and transport is the tests' business: with fanotify a loop device on
// this machine, with cachefiles a disk of a guest (TestFanotify, TestGuests).
package power
