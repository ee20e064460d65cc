//go:build !failpoint

package failpoint

// Enabled says that the build has the tag failpoint.
const Enabled = false

// Hit marks a place where a test may kill the process. name is a constant. In
// this build it does nothing.
func Hit(name string) {}
