package api

import "time"

// A MountRequest names an image and the place to mount it. Exactly one of
// Bootstrap, Reference and Image is set.
type MountRequest struct {
	Mountpoint string `json:"mountpoint"` // absolute path of an existing directory

	Bootstrap string `json:"bootstrap,omitempty"` // absolute path of a RAFS v6 bootstrap
	BlobDir   string `json:"blob_dir,omitempty"`  // absolute path of the directory of its blobs

	Reference string `json:"reference,omitempty"`  // host/repository:tag or host/repository@digest
	PlainHTTP bool   `json:"plain_http,omitempty"` // talk HTTP, not HTTPS, to the registry
	CAFile    string `json:"ca_file,omitempty"`    // PEM file with the registry's certificate authority

	Image string `json:"image,omitempty"` // id of a bound image, see BindRequest

	// DomainID is the scope in which images share their blobs; empty is the default
	// one. Letters, digits, dots, dashes and underscores, at most 128.
	DomainID string `json:"domain_id,omitempty"`
	Pinned   bool   `json:"pinned,omitempty"` // a full cache keeps the image
}

// An UnmountRequest names a mount by its place.
type UnmountRequest struct {
	Mountpoint string `json:"mountpoint"`
}

// A RemoveRequest names an image that is kept.
type RemoveRequest struct {
	Image    string `json:"image"` // its id, or what it was mounted from: reference or bootstrap path
	DomainID string `json:"domain_id,omitempty"`
}

// A Kept is an image of which the cache has something.
type Kept struct {
	ID       string    `json:"id"`
	DomainID string    `json:"domain_id,omitempty"`
	Source   string    `json:"source"`
	Used     time.Time `json:"used"` // last
	InUse    bool      `json:"in_use"`
	Pinned   bool      `json:"pinned,omitempty"`
}

// A Mount is one mounted image as [Status] shows it. All sizes are bytes.
type Mount struct {
	Mountpoint string `json:"mountpoint"`
	ID         string `json:"id"` // sha256 of the bootstrap, or what it was bound as
	DomainID   string `json:"domain_id,omitempty"`
	Source     string `json:"source"`             // reference or bootstrap path
	Transport  string `json:"transport"`          // "fanotify" or "cachefiles"
	Complete   bool   `json:"complete"`           // needs no daemon and no backend any more
	Detached   bool   `json:"detached,omitempty"` // unmounted here, but still used (by a container, say)

	BytesTotal   int64 `json:"bytes_total"`   // of file data the image can read
	BytesPresent int64 `json:"bytes_present"` // of these, in the cache
	BytesFetched int64 `json:"bytes_fetched"` // read from the backend since the daemon opened the image's blobs, compressed

	BackendRequests int64  `json:"backend_requests"`
	CorruptChunks   int64  `json:"corrupt_chunks"` // refused because their digest did not match
	KernelEvents    int64  `json:"kernel_events"`  // of this image's blobs
	Blobs           []Blob `json:"blobs"`
}

// A Blob is one data blob of a mounted image.
type Blob struct {
	ID           string `json:"id"`
	Complete     bool   `json:"complete"`
	BytesTotal   int64  `json:"bytes_total"`
	BytesPresent int64  `json:"bytes_present"`
	BytesFetched int64  `json:"bytes_fetched"`
	Requests     int64  `json:"requests"`
	LastError    string `json:"last_error,omitempty"` // of its last failed fill, redacted; empty after a success
	Denied       bool   `json:"denied,omitempty"`     // that was because the backend wants another login
}

// Status is the whole daemon at one moment.
type Status struct {
	Version   string  `json:"version"`
	PID       int     `json:"pid"`
	Root      string  `json:"root"`
	Transport string  `json:"transport"`
	Images    []Mount `json:"images"`
	Kernel    Kernel  `json:"kernel"`

	Kept       []Kept `json:"kept"`             // images, the least recently used first
	CacheBytes int64  `json:"cache_bytes"`      // of disk that they take
	CacheHigh  int64  `json:"cache_high_bytes"` // above it images that are not in use go, then data of those that are; 0: no limit

	CacheEvicted int64 `json:"cache_evicted_bytes"` // of images in use, since the daemon started

	Sandbox Sandbox `json:"sandbox"`
}

// Sandbox is what the daemon has given up.
type Sandbox struct {
	Mode  string   `json:"mode"`  // off, auto or strict
	Holds []string `json:"holds"` // its parts
	Lacks []string `json:"lacks"` // parts that this machine does not have, each with its reason
}

// Kernel counts the kernel's requests since the daemon started.
type Kernel struct {
	Events    int64 `json:"events"`
	Denied    int64 `json:"denied"`
	InFlight  int64 `json:"in_flight"`
	Malformed int64 `json:"malformed"`
}
