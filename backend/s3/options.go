package s3

import (
	"time"

	"github.com/erofsd/erofsd/backend"
)

// Options say where the bucket is. Region and Bucket are needed.
type Options struct {
	// Endpoint is the server's host or host:port, which serves buckets under its
	// root (path style). "": AWS.
	Endpoint string
	// Scheme is http or https. "": https.
	Scheme string
	Region string
	Bucket string
	// Prefix and the hex digits of a blob's digest are its key.
	Prefix string
	// AccessKeyID and AccessKeySecret are the login, SessionToken comes with a
	// temporary one. Without keys, the login is looked for where AWS's tools do:
	// environment, shared files, web identity, container and instance metadata.
	AccessKeyID, AccessKeySecret, SessionToken string
	// Anonymous reads without a login. There must be no keys.
	Anonymous bool
	// HTTP is how connections to the bucket are made. Those to get a login are made
	// as AWS's tools make them.
	HTTP backend.HTTPOptions
	// Stall is how long a request may go without progress (less than 4 KiB, or no
	// answer) before it is given up. 0: 30 s.
	Stall time.Duration
}
