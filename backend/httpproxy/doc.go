// Package httpproxy reads blobs, range by range, from a plain HTTP server: nydus's
// http-proxy backend. The blob with digest sha256:X is at address/path/X. The server may
// listen on a unix socket.
//
// It never logs in and never lists. ReadAt and Open are one attempt each; put
// backend.Retry around the store. Before it in a read come the decorators of package
// backend, after it the network. It has no locks.
package httpproxy
