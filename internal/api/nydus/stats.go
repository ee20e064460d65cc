package nydus

// numCalls is how many kinds of call are counted, by index: getattr, readlink, open,
// release, read, statfs, getxattr, listxattr, opendir, lookup, readdir, readdirplus,
// access, forget, batch forget.
const numCalls = 15

// buckets is how many classes a distribution has. Sizes: below 1 KiB, below 4 KiB,
// 16 KiB, 64 KiB, 128 KiB, 512 KiB and 1 MiB, and the rest.
const buckets = 8

// FsStats counts the calls of a mount. Latencies are microseconds: up to 200, 1000,
// 20 000, 50 000, 500 000, 1 000 000, 2 000 000, and the rest.
type FsStats struct {
	FilesAccounted  bool             `json:"files_account_enabled"`
	PatternRecorded bool             `json:"access_pattern_enabled"`
	LatestRecorded  bool             `json:"record_latest_read_files_enabled"`
	LatencyMeasured bool             `json:"measure_latency"`
	ID              string           `json:"id"`
	Opens           uint64           `json:"nr_opens"`
	BytesRead       uint64           `json:"data_read"`
	ReadsBySize     [buckets]uint64  `json:"block_count_read"`
	Calls           [numCalls]uint64 `json:"fop_hits"`
	CallErrors      [numCalls]uint64 `json:"fop_errors"`
	CallLatency     [numCalls]uint64 `json:"fop_cumulative_latency_total"`
	ReadsByLatency  [buckets]uint64  `json:"read_latency_dist"`
}

// FsFiles is about the files of a mount.
type FsFiles struct {
	Counters map[uint64]FileStats // by inode number
	Latest   [][]uint64           // inode numbers that were read lately: [first, last] or [one]
}

// FileStats counts the calls of one file.
type FileStats struct {
	TotalCalls  uint64           `json:"total_fops"`
	BytesRead   uint64           `json:"data_read"`
	ReadsBySize [buckets]uint64  `json:"block_count_read"`
	Calls       [numCalls]uint64 `json:"fop_hits"`
	CallErrors  [numCalls]uint64 `json:"fop_errors"`
}

// A FilePattern says when a file was first read.
type FilePattern struct {
	Inode       uint64 `json:"ino"`
	Reads       uint64 `json:"nr_read"`
	FirstSecond uint64 `json:"first_access_time_secs"`
	FirstNanos  uint32 `json:"first_access_time_nanos"`
}

// Inflight is a request that is not answered yet.
type Inflight struct {
	Inode   uint64 `json:"inode"`
	Opcode  uint32 `json:"opcode"`
	Unique  uint64 `json:"unique"`
	Seconds uint64 `json:"timestamp_secs"` // since 1970, when it came
}

// BackendMetrics counts the reads of a backend. Latencies are milliseconds: up to 1,
// 20, 50, 100, 500, 1000, 2000, and the rest.
type BackendMetrics struct {
	Type          string                   `json:"backend_type"`
	Reads         uint64                   `json:"read_count"`
	Errors        uint64                   `json:"read_errors"`
	Bytes         uint64                   `json:"read_amount_total"`
	Latency       uint64                   `json:"read_cumulative_latency_millis_total"`
	LatencyBySize [buckets]uint64          `json:"read_cumulative_latency_millis_dist"`
	ReadsBySize   [buckets]uint64          `json:"read_count_block_size_dist"`
	ReadsByBoth   [buckets][buckets]uint64 `json:"read_latency_sizes_dist"` // latency, then size
}

// CacheMetrics is the cache of one or more images. Sizes are bytes.
type CacheMetrics struct {
	// Files are the names of the cache files, "<blob id>.blob.data". Clients remove
	// what they do not find here: it is never empty by mistake.
	Files               []string `json:"underlying_files"`
	Dir                 string   `json:"store_path"`
	PartialHits         uint64   `json:"partial_hits"`
	WholeHits           uint64   `json:"whole_hits"`
	Total               uint64   `json:"total"`
	Entries             uint64   `json:"entries_count"`
	PrefetchBytes       uint64   `json:"prefetch_data_amount"`
	PrefetchRequests    uint64   `json:"prefetch_requests_count"`
	PrefetchWorkers     uint64   `json:"prefetch_workers"`
	PrefetchUnmerged    uint64   `json:"prefetch_unmerged_chunks"`
	PrefetchMillis      uint64   `json:"prefetch_cumulative_time_millis"`
	PrefetchBeginSecond uint64   `json:"prefetch_begin_time_secs"`
	PrefetchBeginMillis uint64   `json:"prefetch_begin_time_millis"`
	PrefetchEndSecond   uint64   `json:"prefetch_end_time_secs"`
	PrefetchEndMillis   uint64   `json:"prefetch_end_time_millis"`
	BufferedBytes       uint64   `json:"buffered_backend_size"`
	Complete            bool     `json:"data_all_ready"`
}
