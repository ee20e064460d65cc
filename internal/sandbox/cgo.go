//go:build cgo

package sandbox

// withCgo says that the program may have threads that the Go runtime cannot reach.
const withCgo = true
