// Package oss reads blobs, range by range, from Alibaba Cloud's object storage. Before
// it in a read come the decorators of package backend, after it the vendor's client and
// the network.
//
// It never caches, verifies no chunk (blobmgr does), writes nothing, follows no redirect
// and tries nothing again but a request that was refused because of the clock.
//
// Requests are signed by version 4 of OSS's scheme, for which the region must be known:
// from [Options] or from an endpoint of Alibaba Cloud's, whose name has it. Other
// endpoints (names of one's own, the accelerated one) get version 1, which needs none and
// is what nydusd uses everywhere; OSS no longer takes it for buckets made since autumn
// 2025.
//
// Read [Options] first. It holds no lock.
package oss
