// Package s3 reads blobs, range by range, from S3 and what speaks it. Before it in a
// read come the decorators of package backend, after it the vendor's client and the
// network.
//
// It never caches, verifies no chunk (blobmgr does), writes nothing, follows no redirect
// and tries nothing again but a request that was refused for a login or clock that was
// stale. The build tag nos3 leaves it out, and with it the vendor's client: [New] then
// says so.
//
// Read [Options] first. The only lock is found.mu, around the login that was looked for.
package s3
