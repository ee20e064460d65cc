// Package e2e holds tests that run erofsd as its users do: the daemon as a process, on this
// machine's kernel by way of fanotify, told by nydusd's API where an image's blobs are, over
// the servers of kernel-tests/services. Whatever those servers do, what is read must be
// right, what is kept must be right, and no read may wait without a bound.
package e2e
