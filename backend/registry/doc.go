// Package registry reads blobs, range by range, from an OCI registry, resolves
// references to manifests and pushes images. Before it in a read come the
// decorators of package backend, after it the network.
//
// It never caches blob bytes, verifies no chunk (blobmgr does), follows no URL
// that a manifest names, and sends a credential to no host but the registry that
// asked for it and the token service that registry names. ReadAt and Open are one
// attempt each; [Store.Manifest], [Store.Fetch] and [Pusher] try again by
// themselves.
//
// Read [Store] and blob first. The only lock is blob.mu; nothing is called under it.
package registry
