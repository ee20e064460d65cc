package api

import "encoding/json"

// A BindRequest makes an image known under a name, so that it can be mounted: by
// MountRequest.Image or, with cachefiles, by mount(8). The same again is success and
// brings what is new in Config.
type BindRequest struct {
	ID        string `json:"id"`                  // the name: an fsid
	DomainID  string `json:"domain_id,omitempty"` // as in MountRequest
	Bootstrap string `json:"bootstrap"`           // absolute path of a RAFS v6 bootstrap; it is copied
	// Config is a document of nydus's, version 1 or 2: where the data come from. TOML goes
	// as a string. It may hold credentials, which are kept in memory only.
	Config json.RawMessage `json:"config"`
	Pinned bool            `json:"pinned,omitempty"`
}

// An ImageRequest names an image.
type ImageRequest struct {
	Image    string `json:"image"` // its id
	DomainID string `json:"domain_id,omitempty"`
}

// A PrefetchRequest asks for files of a mounted image to be fetched in the background, in
// their order.
type PrefetchRequest struct {
	Image    string   `json:"image"` // its id
	DomainID string   `json:"domain_id,omitempty"`
	Files    []string `json:"files"` // paths in the image; a directory with all below
}

// A PinRequest says whether a full cache keeps an image.
type PinRequest struct {
	Image    string `json:"image"` // its id
	DomainID string `json:"domain_id,omitempty"`
	Pinned   bool   `json:"pinned"`
}

// Usage is what an image takes. Sizes are bytes.
type Usage struct {
	Disk    int64       `json:"disk"` // of its metadata and blobs, also those that others share
	Present int64       `json:"present"`
	Total   int64       `json:"total"`
	Blobs   []BlobUsage `json:"blobs"`
}

// BlobUsage is what a blob takes.
type BlobUsage struct {
	ID   string `json:"id"`
	Disk int64  `json:"disk"`
}

// Cache is what the cache takes. Sizes are bytes.
type Cache struct {
	Bytes  int64 `json:"bytes"`
	High   int64 `json:"high"` // 0: no limit
	Low    int64 `json:"low"`
	Images int   `json:"images"` // kept
}

// An UpgradeRequest asks for another worker.
type UpgradeRequest struct {
	Executable string `json:"executable,omitempty"` // absolute path; "": the keeper's own again
}

// An EvictRequest asks for room: images that are neither used nor pinned go, the least
// recently used first.
type EvictRequest struct {
	Target int64 `json:"target"` // bytes that the cache may take in the end
}

// A ScrubRequest asks for what the cache has to be verified.
type ScrubRequest struct {
	Images   []string `json:"images,omitempty"` // ids, or what they were mounted from; none: everything
	DomainID string   `json:"domain_id,omitempty"`
	Rate     int64    `json:"rate,omitempty"` // at most so many bytes in a second; 0: 50 MiB
}

// A Scrub is what was found. Wrong = Repaired + Unrepaired.
type Scrub struct {
	Blobs      int64    `json:"blobs"` // that were looked at
	Chunks     int64    `json:"chunks"`
	Bytes      int64    `json:"bytes"`
	Wrong      int64    `json:"wrong"` // chunks
	Repaired   int64    `json:"repaired"`
	Unrepaired int64    `json:"unrepaired"`
	Errors     []string `json:"errors,omitempty"` // why not; the first ones
}

// VersionInfo says what runs.
type VersionInfo struct {
	Version   string `json:"version"`
	Commit    string `json:"commit,omitempty"`
	Go        string `json:"go"`
	Transport string `json:"transport"`
	PID       int    `json:"pid"`
}
