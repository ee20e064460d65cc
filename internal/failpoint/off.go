//go:build !failpoint

package failpoint

// Hit marks a place where a test may kill the process. name is a constant. In
// this build it does nothing.
func Hit(name string) {}
