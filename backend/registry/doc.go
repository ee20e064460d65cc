// Package registry reads blobs, range by range, from an OCI registry, resolves
// references to manifests and pushes images. Before it in a read come the
// decorators of package backend, after it the network.
//
// It never caches blob bytes, verifies no chunk (blobmgr does), follows no URL
// that a manifest names, and sends a credential to no host but the registry that
// asked for it, the token service that registry names, and mirrors that were
// configured to get it. ReadAt and Open are one attempt each (at each mirror and the
// registry); [Store.Manifest], [Store.Fetch] and [Pusher] try again by themselves.
//
// Read [Store] first, then route (which servers), site (one of them: requests and
// redirects), login (challenges and tokens) and blob. The locks core.mu, login.mu,
// grant.mu, tokens.mu and blob.mu are leaves; nothing is called under them.
package registry
