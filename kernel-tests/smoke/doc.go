// Package smoke runs the daemon as nydus-snapshotter and operators' scripts do: by
// nydusd's API, with mounts that are made from outside, over every way to a kernel. Its
// cases have the names that nydus's own catalogue of tests gives them, and catalogue_test.go
// says of each where it is, or why it is not here:
//
//	go test ./kernel-tests/smoke -run TestSmoke/fanotify/TestMetrics
//	CGO_ENABLED=0 go test -exec 'vm -kernel 6.12' ./kernel-tests/smoke -run /cachefiles
//
// Read first: machine_test.go, a daemon in a process of its own, and snapshot_test.go,
// what nydus-snapshotter has of an image and asks the daemon for.
package smoke
