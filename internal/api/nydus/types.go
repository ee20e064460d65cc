package nydus

import (
	"encoding/json"
	"time"
)

// State is what the daemon is doing.
type State string

// The states, in nydusd's spelling.
const (
	Init    State = "INIT"    // waits for its beginning or a takeover
	Ready   State = "READY"   // has all it needs, and waits for Start
	Running State = "RUNNING" // serves
	Stopped State = "STOPPED"
	Unknown State = "UNKNOWN"
)

// DaemonInfo is the daemon at one moment. Fields are sent in this order.
type DaemonInfo struct {
	Version    Version            `json:"version"`
	ID         *string            `json:"id"`
	Supervisor *string            `json:"supervisor"`
	State      State              `json:"state"`
	Backends   map[string]Backend `json:"backend_collection"` // by mount point; nil without mounts of its own
}

// Version says what runs.
type Version struct {
	Package   string `json:"package_ver"`
	GitCommit string `json:"git_commit"`
	BuildTime string `json:"build_time"`
	Profile   string `json:"profile"`
	Compiler  string `json:"rustc"`
}

// A Backend is one mount.
type Backend struct {
	Type       string          `json:"backend_type"` // Rafs
	Mountpoint string          `json:"mountpoint"`
	Mounted    MountTime       `json:"mounted_time"`
	Config     json.RawMessage `json:"config"` // without secrets; nil: null
}

// MountTime is sent as an array of year, day of the year, hour, minute, second,
// nanosecond, and the zone's hours, minutes and seconds.
type MountTime time.Time

// MarshalJSON implements [json.Marshaler].
func (m MountTime) MarshalJSON() ([]byte, error) {
	t := time.Time(m).UTC()
	return json.Marshal([9]int{t.Year(), t.YearDay(), t.Hour(), t.Minute(), t.Second(), t.Nanosecond()})
}

// UnmarshalJSON implements [json.Unmarshaler]. What is no such array is the zero time: other
// versions of nydusd say it otherwise, and nothing depends on it.
func (m *MountTime) UnmarshalJSON(p []byte) error {
	var a [9]int
	if json.Unmarshal(p, &a) == nil && a[0] > 0 {
		*m = MountTime(time.Date(a[0], time.January, a[1], a[2], a[3], a[4], a[5], time.UTC))
	}
	return nil
}

// Events are the last errors that somebody noticed.
type Events struct {
	MaxErrors   int      `json:"max_errors"`
	TotalErrors int64    `json:"total_errors"` // since the start
	MaxSize     int      `json:"max_size"`     // bytes
	TotalSize   int      `json:"total_size"`   // bytes
	Errors      []string `json:"errors"`       // the oldest first, "<HTTP date> - <text>"
}

// A MountCommand says what to mount.
type MountCommand struct {
	Source        string
	Type          FsType
	Config        string // a JSON document
	PrefetchFiles []string
}

// FsType is a kind of file system.
type FsType string

// The kinds of file system.
const (
	Rafs        FsType = "rafs"
	Passthrough FsType = "passthrough_fs"
)

// The types of a [BlobInfo].
const (
	BootstrapBlob = "bootstrap"
	DataBlob      = "datablob"
)

// BlobInfo is a registered blob. Sizes are bytes.
type BlobInfo struct {
	Type      string   `json:"type"`
	ID        string   `json:"id"`
	DomainID  string   `json:"domain_id"`
	ConfigID  string   `json:"config_id,omitempty"`    // of a bootstrap
	Backend   string   `json:"backend_type,omitempty"` // where its data comes from
	Blobs     []string `json:"blobs,omitempty"`        // data blobs of a bootstrap
	Images    int      `json:"images,omitempty"`       // registered bootstraps that use this data blob
	Size      int64    `json:"size"`
	Allocated int64    `json:"allocated"` // of the disk, by its cache file
	Open      bool     `json:"open"`      // the kernel has it
}

// ConfigKeys returns the keys that SetConfig may change.
func ConfigKeys() []string {
	return []string{"registry_auth", "proxy_url", "dragonfly_scheduler_endpoint"}
}

// A Superblock summarises the metadata of a mounted image.
type Superblock struct {
	Magic                 uint32   `json:"magic"`
	Version               uint32   `json:"version"`
	Size                  uint32   `json:"sb_size"`
	RootInode             uint64   `json:"root_inode"`
	ChunkSize             uint32   `json:"chunk_size"`
	BatchSize             uint32   `json:"batch_size"`
	Inodes                uint64   `json:"inodes_count"`
	Flags                 Flags    `json:"flags"`
	InodeTableEntries     uint32   `json:"inode_table_entries"`
	InodeTableOffset      uint64   `json:"inode_table_offset"`
	BlobTableSize         uint32   `json:"blob_table_size"`
	BlobTableOffset       uint64   `json:"blob_table_offset"`
	ExtraBlobTableOffset  uint64   `json:"extended_blob_table_offset"`
	ExtraBlobTableEntries uint32   `json:"extended_blob_table_entries"`
	BlobDeviceTableCount  uint32   `json:"blob_device_table_count"`
	BlobDeviceTableOffset uint64   `json:"blob_device_table_offset"`
	PrefetchTableOffset   uint64   `json:"prefetch_table_offset"`
	PrefetchTableEntries  uint32   `json:"prefetch_table_entries"`
	AttrTimeout           Duration `json:"attr_timeout"`
	EntryTimeout          Duration `json:"entry_timeout"`
	ChunkDict             bool     `json:"is_chunk_dict"`
	MetadataBlockAddress  uint32   `json:"meta_blkaddr"`
	RootNid               uint16   `json:"root_nid"`
	ChunkTableOffset      uint64   `json:"chunk_table_offset"`
	ChunkTableSize        uint64   `json:"chunk_table_size"`
}

// Flags are bits.
type Flags struct {
	Bits uint64 `json:"bits"`
}

// Duration is sent as seconds and nanoseconds.
type Duration time.Duration

// MarshalJSON implements [json.Marshaler].
func (d Duration) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Secs  int64 `json:"secs"`
		Nanos int64 `json:"nanos"`
	}{int64(d) / int64(time.Second), int64(d) % int64(time.Second)})
}
