// Package object is what stores of objects by name (backend/s3, backend/oss, and plain
// servers: backend/httpproxy) have in common: blobs that are read range by range under a
// key, from a server that may replace the object meanwhile, with a client of its vendor.
//
// It signs nothing and knows no vendor: those packages give it one function that sends
// a request. It is not for registries, which redirect and name blobs by digest.
//
// Read [Store] first, then [Client]. The only lock is blob.mu; nothing is called under it.
package object
