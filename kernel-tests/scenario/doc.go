// Package scenario is one list of things that happen to a daemon and its images, run
// over every way to a kernel that there is: fake and real, fanotify and cachefiles.
// A scenario has the same name everywhere:
//
//	go test ./kernel-tests/scenario -run TestScenarios/fanotify/wrong-bytes
//
// With a real kernel the daemon is a process of its own and images are read through
// their mounts. With a fake one it runs in the test, and a mount is a table in which
// the test looks up what EROFS would have looked up, asking the daemon as EROFS would.
//
// Read first: [Scenario], [Row] and read.go; then machine.go, which hides the
// difference. Locks: each type's own mu, none held over another or while waiting.
package scenario
